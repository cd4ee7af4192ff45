"""What a training will need, before any weight is loaded. Light: no torch, only headers and config.json are read."""

import json
import re
from dataclasses import dataclass
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.training.base import base_folder, weight_shapes
from sft_pipeline.training.config import ModelConfig, TrainingConfig

EMBEDDING = re.compile(
    r"(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|lm_head|embed_out|output\.weight)"
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process; parameters are counted. An estimate: fragmentation and libraries come on top."""

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits

    def as_dict(self) -> dict[str, int]:
        return {**self.__dict__, "total": self.total}


def estimate(
    model: ModelConfig,
    training: TrainingConfig,
    *,
    tokens: int,
    supervised: int | None = None,
    gpu: bool = False,
) -> MemoryEstimate:
    """Memory of one process.

    Args:
        tokens: In one micro-batch (per_device_batch x max_length, or what the plan says).
        supervised: Of them, scored; None takes all.
        gpu: Weights are held in bf16 where they are frozen, computation is bf16; fp32 on a CPU.

    Raises:
        InputError: Unknown base, or no safetensors.
    """
    folder = base_folder(model)
    shapes = weight_shapes(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: not JSON ({error})") from error
    config = config.get("text_config", config)
    total = sum(_size(s) for s in shapes.values())
    trainable = _trainable(shapes, model)
    compute = (
        2
        if gpu and training.precision in ("auto", "bf16", "fp16")
        else (2 if training.precision == "bf16" else 4)
    )
    if model.parameterization == "full":
        weights = total * 4
    elif model.parameterization == "lora":
        weights = total * compute + trainable * 4
    else:
        linear = sum(_size(s) for n, s in shapes.items() if len(s) == 2 and not EMBEDDING.search(n))
        weights = int(linear * 0.52) + (total - linear) * compute + trainable * 4
    return MemoryEstimate(
        parameters=total + (trainable if model.parameterization != "full" else 0),
        trainable=trainable,
        weights=weights,
        gradients=trainable * 4,
        optimizer=trainable * 8,
        activations=_activations(config, shapes, tokens, compute, training.gradient_checkpointing),
        logits=_logits(shapes, config, supervised if supervised is not None else tokens, gpu),
    )


def _size(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def _trainable(shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> int:
    if model.parameterization == "full":
        return sum(_size(s) for n, s in shapes.items() if not any(re.search(p, n) for p in model.freeze))
    targets = model.lora.target_modules
    found = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or EMBEDDING.search(name):
            continue
        if targets == "all-linear":
            hit = True
        elif isinstance(targets, str):
            hit = re.fullmatch(targets, module) is not None
        else:
            hit = any(module == t or module.endswith("." + t) for t in targets)
        if hit:
            found += model.lora.r * (shape[0] + shape[1]) + (shape[0] if model.lora.use_dora else 0)
    return found


def _activations(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokens: int, compute: int, checkpointing: bool
) -> int:
    """Values kept per token and layer: about 8 of the hidden width and 3 of the MLP's (norms, q, k, v, attention, MLP).

    After Korthikanti et al. 2022 (arXiv:2205.05198), without the attention matrix, which sdpa and flash attention do
    not keep. Checkpointing keeps one hidden vector per layer, and one layer whole while it is recomputed.
    """
    hidden = (
        config.get("hidden_size")
        or config.get("n_embd")
        or max((s[-1] for s in shapes.values() if len(s) == 2), default=0)
    )
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 1
    middle = config.get("intermediate_size") or 4 * hidden
    layer = tokens * (8 * hidden + 3 * middle) * compute
    return layers * tokens * hidden * compute + layer if checkpointing else layers * layer


def _logits(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], supervised: int, gpu: bool) -> int:
    """Three fp32 copies of one chunk of logits: see loss.chunk_rows."""
    vocabulary = config.get("vocab_size") or max(
        (s[0] for n, s in shapes.items() if EMBEDDING.search(n)), default=1
    )
    rows = min(supervised, max(32, (1 << (26 if gpu else 24)) // vocabulary))
    return 3 * 4 * rows * vocabulary

"""Memory of a training: an estimate before any weight is loaded, advice where it does not fit, what is used.

Light: only headers and config.json are read; torch is imported where memory in use is asked for.
"""

import functools
import json
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.bounded import matching
from sft_pipeline.errors import InputError
from sft_pipeline.training.base import base_folder
from sft_pipeline.training.config import ModelConfig, TrainingConfig

ENOUGH = 0.9  # share of a device that an estimate may fill: fragmentation and libraries come on top
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
    total = sum(math.prod(s) for s in shapes.values())
    trainable = _trainable(shapes, model)
    half = training.precision == "bf16" or (gpu and training.precision in ("auto", "fp16"))
    compute = 2 if half else 4
    if model.parameterization == "full":
        weights = total * 4
    elif model.parameterization == "lora":
        weights = total * compute + trainable * 4
    else:
        linear = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and not EMBEDDING.search(n))
        weights = int(linear * 0.52) + (total - linear) * compute + trainable * 4
    # Three fp32 copies of one chunk of logits: see loss.chunk_rows.
    vocabulary = config.get("vocab_size") or max(
        (s[0] for n, s in shapes.items() if EMBEDDING.search(n)), default=1
    )
    rows = min(
        supervised if supervised is not None else tokens, max(32, (1 << (26 if gpu else 24)) // vocabulary)
    )
    return MemoryEstimate(
        parameters=total + (trainable if model.parameterization != "full" else 0),
        trainable=trainable,
        weights=weights,
        gradients=trainable * 4,
        optimizer=trainable * 8,
        activations=_activations(config, shapes, tokens, compute, training.gradient_checkpointing),
        logits=3 * 4 * rows * vocabulary,
    )


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, from the headers of the safetensors files; no weight is read.

    Raises:
        InputError: The folder has no safetensors, or a header cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no safetensors files. Only those are loaded: convert the model first")
    for path in files:
        try:
            with path.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (ValueError, OSError, MemoryError, OverflowError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _trainable(shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> int:
    if model.parameterization == "full":
        frozen = [matching("model.freeze", pattern, list(shapes)) for pattern in model.freeze]
        return sum(math.prod(s) for n, s in shapes.items() if not any(n in names for names in frozen))
    targets = model.lora.target_modules
    hits: set[str] = set()
    if isinstance(targets, str) and targets != "all-linear":
        modules = [name.removesuffix(".weight") for name in shapes]
        hits = matching("model.lora.target_modules", targets, modules, whole=True)
    found = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or EMBEDDING.search(name):
            continue
        if targets == "all-linear":
            hit = True
        elif isinstance(targets, str):
            hit = module in hits
        else:
            hit = any(module == t or module.endswith("." + t) for t in targets)
        if hit:
            found += model.lora.r * (shape[0] + shape[1]) + (shape[0] if model.lora.use_dora else 0)
    return found


def _activations(
    config: dict[str, Any], shapes: dict[str, tuple[int, ...]], tokens: int, compute: int, checkpointing: bool
) -> int:
    """Values kept per token and layer: 8 of the hidden width (norms, q, k, v, attention), 3 of the MLP's.

    After Korthikanti et al. 2022 (arXiv:2205.05198), without the attention matrix, which sdpa and flash
    attention do not keep. Checkpointing keeps one hidden vector per layer, and one layer whole while it is
    recomputed.
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


@dataclass(frozen=True)
class DeviceBudget:
    """What the processes have: `available` bytes, each its own GPU, or all of them the machine's memory."""

    available: int
    gpu: bool

    def share(self, memory: MemoryEstimate, processes: int) -> float:
        return memory.total * (1 if self.gpu else processes) / self.available


def advise(
    memory: MemoryEstimate,
    model: ModelConfig,
    training: TrainingConfig,
    device: DeviceBudget,
    *,
    tokens: int,
    supervised: int,
) -> str:
    """One sentence or two: how full a device gets, and what to change where it gets too full.

    Args:
        memory: The estimate for these settings.
        tokens, supervised: Of a micro-batch, as for `memory.estimate`.
    """
    share = device.share(memory, training.processes)
    where = "GPU memory" if device.gpu else "memory"
    copies = f"{training.processes} x " if training.processes > 1 and not device.gpu else ""
    needed, available = memory.total / 2**30, device.available / 2**30
    summary = f"about {copies}{needed:.2f} GiB of {available:.1f} GiB {where} ({share:.0%})"
    if share <= ENOUGH:
        return summary
    fitting = [
        f"{what} ({other.total / 2**30:.2f} GiB)"
        for what, other in _alternatives(model, training, tokens, supervised, device.gpu)
        if device.share(other, training.processes) <= ENOUGH
    ]
    if fitting:
        return f"{summary}: one device is not enough as it is. What would fit: {'; '.join(fitting)}"
    return f"{summary}: one device is not enough, whatever is set. {_sharded(memory, device)}"


def _alternatives(
    model: ModelConfig, training: TrainingConfig, tokens: int, supervised: int, gpu: bool
) -> Iterator[tuple[str, MemoryEstimate]]:
    """What could be set instead, the least change of the result first."""
    checkpointing = training.model_copy(update={"gradient_checkpointing": True})
    whole = functools.partial(estimate, tokens=tokens, supervised=supervised, gpu=gpu)
    if not training.gradient_checkpointing:
        yield "training.gradient_checkpointing true", whole(model, checkpointing)
    batch = training.per_device_batch
    if batch > 1:
        single = functools.partial(estimate, tokens=tokens // batch, supervised=supervised // batch, gpu=gpu)
        same = f"training.per_device_batch 1 with training.blocks_per_update {training.planned_blocks}"
        yield same, single(model, training)
        if not training.gradient_checkpointing:
            yield f"{same} and gradient_checkpointing true", single(model, checkpointing)
    lighter = {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[model.parameterization]
    for parameterization in lighter:
        other = model.model_copy(update={"parameterization": parameterization})
        yield f"model.parameterization {parameterization}", whole(other, training)


def _sharded(memory: MemoryEstimate, device: DeviceBudget) -> str:
    """Weights, gradients and optimizer divide over devices; activations and logits do not."""
    left = ENOUGH * device.available - memory.activations - memory.logits
    states = memory.weights + memory.gradients + memory.optimizer
    if left <= 0:
        return "Its activations alone are too much: lower tokens.max_length, or take a larger device"
    devices = max(2, math.ceil(states / left))
    return f"Take a larger device, or shard the weights (FSDP2, ZeRO-3) over {devices} or more such devices"


def memory_mb() -> float:
    """Peak GPU memory of this process, or its resident memory on a CPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process(os.getpid()).memory_info().rss / 2**20


def peak_memory_mb() -> float:
    """The most that this process has had so far: of the GPU's memory, or resident on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_slack_mb() -> float:
    """What a GPU's allocator has reserved and does not use; 0 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated()) / 2**20

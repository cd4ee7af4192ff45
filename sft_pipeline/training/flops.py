"""The arithmetic of a training: against what a GPU could do at best (MFU), and as seconds on this CPU.

Utilization is after Chowdhery et al. 2022 (PaLM, appendix B), for what is trained here: a frozen weight costs
no gradient of its own, only supervised positions are projected onto the vocabulary, and attention reaches no
further than the example. What gradient checkpointing computes twice counts once. Light: no torch.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sft_pipeline.training.progress import UpdateNumbers

# Dense 16-bit matrix TFLOP/s of the makers' data sheets: bf16 with fp32 accumulation, fp16 where a device has
# no bf16.
PEAKS = (
    (r"B200", 2250.0),
    (r"H100.*PCIe", 756.0),
    (r"H100.*NVL", 835.0),
    (r"(H100|H200|H800|GH200)", 989.0),
    (r"(A100|A800)", 312.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"A10G", 70.0),
    (r"A10", 125.0),
    (r"A40", 149.7),
    (r"RTX A6000", 154.8),
    (r"RTX 6000 Ada", 364.2),
    (r"RTX 5090", 209.5),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"V100", 125.0),
    (r"T4", 65.0),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of one device at best, by its name ("NVIDIA A100-SXM4-80GB"); None where it is not known."""
    for pattern, tera in PEAKS:
        if re.search(rf"(?<![0-9A-Za-z]){pattern}(?![0-9A-Za-z])", device_name):
            return tera * 1e12
    return None


@dataclass(frozen=True)
class Arithmetic:
    """What of a model is multiplied.

    Attributes:
        body: Weights of its linear layers, adapters among them, without embeddings and output layer.
        trained: Of them, trained.
        head: Weights of the output layer.
        head_trained: Whether that one is trained.
        layers, width: Of the attention; width is heads x size of a head.
    """

    body: int
    trained: int
    head: int
    head_trained: bool
    layers: int
    width: int

    def of(self, tokens: int, supervised: int, examples: int) -> float:
        """FLOPs of one update, forward and backward.

        A weight costs 2 a token forward, 2 for the gradient of its input, and 2 for its own gradient where it
        is trained: 6N for full fine-tuning, 4N for a frozen base. Of attention's 12 x width x keys a token
        and layer, causality leaves half. Examples are taken to be equally long, which counts attention a
        little low.
        """
        weights = (4 * self.body + 2 * self.trained) * tokens
        head = (6 if self.head_trained else 4) * self.head * supervised
        attention = 6 * self.layers * self.width * tokens * (tokens / max(1, examples))
        return weights + head + attention


def arithmetic(model: Any) -> Arithmetic | None:
    """Counts a causal model's weights; None for a mixture of experts, of which a token meets only some.

    Args:
        model: As loaded for training, in its wrappers or without.
    """
    from sft_pipeline.training.loss import causal_model

    causal = causal_model(model)
    config = causal.config.get_text_config()
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        return None
    head, embedding = causal.get_output_embeddings(), causal.get_input_embeddings()
    apart = {id(p) for m in (head, embedding) if m is not None for p in m.parameters()}
    body = trained = 0
    for p in model.parameters():
        if id(p) not in apart and p.ndim > 1:
            n = p.numel() * (2 if type(p).__name__ == "Params4bit" else 1)
            body += n
            trained += n if p.requires_grad else 0
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return Arithmetic(
        body=body,
        trained=trained,
        head=head.weight.numel() if head is not None else 0,
        head_trained=head is not None and head.weight.requires_grad,
        layers=config.num_hidden_layers,
        width=heads * size,
    )


def meter(
    model: Any, device_name: str, precision: str, devices: int
) -> Callable[[UpdateNumbers], float] | None:
    """Gives the utilization of each update; None where it is unknown: a CPU, another GPU, fp32, experts."""
    counted = arithmetic(model) if peak_flops(device_name) and precision != "fp32" else None
    if counted is None:
        return None

    def share(n: UpdateNumbers) -> float:
        flops = counted.of(n.tokens, n.supervised, n.examples)
        return utilization(flops, n.seconds, device_name, devices) or 0.0

    return share


def utilization(flops: float, seconds: float, device_name: str, devices: int = 1) -> float | None:
    """Share of the peak, 0 to 1; None where the peak is not known."""
    peak = peak_flops(device_name)
    return flops / max(seconds, 1e-9) / (peak * devices) if peak else None


# Share of a matrix product's peak that a training step reaches, and floating-point operations per parameter
# and token forward and backward (Kaplan et al. 2020). Good for an order of magnitude; the sanity check
# measures.
UTILISATION = 0.3
FLOPS_PER_PARAMETER_AND_TOKEN = 6
MATRIX, ROUNDS = 768, 10


def training_seconds(parameters: int, tokens: int) -> float:
    """Seconds of training on so many tokens."""
    return tokens * parameters * FLOPS_PER_PARAMETER_AND_TOKEN / (_flops_per_second() * UTILISATION)


@lru_cache
def _flops_per_second() -> float:
    a = np.ones((MATRIX, MATRIX), dtype=np.float32)
    a @ a
    start = time.perf_counter()
    for _ in range(ROUNDS):
        a @ a
    return ROUNDS * 2 * MATRIX**3 / (time.perf_counter() - start)

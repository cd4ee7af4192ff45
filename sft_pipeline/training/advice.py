"""Does the training fit its devices, and if not, what would. Light: no torch."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.memory import MemoryEstimate, estimate

ENOUGH = 0.9  # share of a device that an estimate may fill: fragmentation and libraries come on top


@dataclass(frozen=True)
class Place:
    """What the processes have: `available` bytes, each its own GPU, or all of them the machine's memory."""

    available: int
    gpu: bool

    def share(self, memory: MemoryEstimate, processes: int) -> float:
        return memory.total * (1 if self.gpu else processes) / self.available


def advise(
    memory: MemoryEstimate,
    model: ModelConfig,
    training: TrainingConfig,
    place: Place,
    *,
    tokens: int,
    supervised: int,
) -> str:
    """One sentence or two: how full a device gets, and what to change where it gets too full.

    Args:
        memory: The estimate for these settings.
        tokens, supervised: Of a micro-batch, as for `memory.estimate`.
    """
    share = place.share(memory, training.processes)
    where = "GPU memory" if place.gpu else "memory"
    copies = f"{training.processes} x " if training.processes > 1 and not place.gpu else ""
    said = f"about {copies}{memory.total / 2**30:.2f} GiB of {place.available / 2**30:.1f} GiB {where} ({share:.0%})"
    if share <= ENOUGH:
        return said
    fitting = [
        f"{what} ({other.total / 2**30:.2f} GiB)"
        for what, other in _alternatives(model, training, tokens, supervised, place.gpu)
        if place.share(other, training.processes) <= ENOUGH
    ]
    if fitting:
        return f"{said}: one device is not enough as it is. What would fit: {'; '.join(fitting)}"
    return f"{said}: one device is not enough, whatever is set. {_sharded(memory, place)}"


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


def _sharded(memory: MemoryEstimate, place: Place) -> str:
    """Weights, gradients and optimizer divide over devices; activations and logits do not."""
    left = ENOUGH * place.available - memory.activations - memory.logits
    states = memory.weights + memory.gradients + memory.optimizer
    if left <= 0:
        return "Its activations alone are too much: lower tokens.max_length, or take a larger device"
    devices = max(2, math.ceil(states / left))
    return f"Take a larger device, or shard the weights (FSDP2, ZeRO-3) over {devices} or more such devices"

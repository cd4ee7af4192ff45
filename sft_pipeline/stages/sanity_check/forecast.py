"""What the training will take: time from the short run, memory from the fullest micro-batch, each with an error bar."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import Any

from sft_pipeline.training.data import Feed, microbatches
from sft_pipeline.training.memory import memory_slack_mb, peak_memory_mb
from sft_pipeline.training.shards import Shards

# What a short run cannot show: a busier machine or a hotter device later, buffers that grow. A share of the whole.
TIME_UNSEEN, MEMORY_UNSEEN = 0.1, 0.05
MOMENTS_BYTES = 8  # two of AdamW's in fp32, for each trained parameter


@dataclass(frozen=True)
class WorstBlock:
    """One update's work on the fullest micro-batch. `memory_mb`: the peak, without the optimizer, which came later."""

    blocks: tuple[int, ...]
    tokens: int
    supervised: int
    memory_mb: float
    seconds: float


def worst_block(model: Any, shards: Shards, feed: Feed, fullest: Sequence[int]) -> WorstBlock:
    """Forward and backward over the fullest blocks of the whole plan, as one micro-batch of the layout in use.

    Args:
        fullest: Block numbers, the longest first, of equally long ones the most supervised.
    """
    blocks = [shards.block(i) for i in fullest[: feed.per_device_batch]]
    batch = max(
        microbatches(
            blocks, layout=feed.layout, per_device_batch=feed.per_device_batch, max_tokens=feed.max_tokens
        ),
        key=lambda m: m.inputs["input_ids"].numel(),
    )
    device = next(model.parameters()).device
    model.train()
    began = time.monotonic()
    batch = batch.to(device)
    model(**batch.inputs, supervised_index=batch.index, supervised_targets=batch.targets, reduction="sum")[
        "nll"
    ].backward()
    model.zero_grad(set_to_none=True)
    return WorstBlock(
        tuple(b.block for b in blocks),
        batch.inputs["input_ids"].numel(),
        len(batch.targets),
        peak_memory_mb(),
        time.monotonic() - began,
    )


@dataclass(frozen=True)
class Forecast:
    """Of the whole training. `error`: one standard deviation of the updates' own spread, and a tenth for what a short
    run does not show. `memory_mb`: the peak of one process."""

    updates: int
    seconds: float
    error: float
    memory_mb: float
    memory_error_mb: float

    @property
    def words(self) -> str:
        return (
            f"{self.updates:,} updates in about {_clock(self.seconds)} (give or take {_clock(self.error)}) in one process, evaluations and checkpoints not counted; "
            f"{self.memory_mb:,.0f} MB (give or take {self.memory_error_mb:,.0f})"
        )


def forecast(
    seconds: Sequence[float], updates: int, worst: WorstBlock, trained_parameters: int
) -> Forecast | None:
    """
    Args:
        seconds: Of the short run's updates, of which the first, which warms things up, does not count.
        updates: Of the training to come.
    """
    seconds = seconds[1:] or seconds
    if not seconds:
        return None
    spread = pstdev(seconds) if len(seconds) > 1 else seconds[0]
    total = mean(seconds) * updates
    # The sum's own noise, that of the mean it is scaled from, and the unseen.
    error = spread * math.sqrt(updates) + updates * spread / math.sqrt(len(seconds)) + TIME_UNSEEN * total
    memory = max(worst.memory_mb + trained_parameters * MOMENTS_BYTES / 2**20, peak_memory_mb())
    return Forecast(updates, total, error, memory, MEMORY_UNSEEN * memory + memory_slack_mb())


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

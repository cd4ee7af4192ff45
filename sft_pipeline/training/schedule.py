"""The learning rate of every update, as a pure function of its number. Light: no torch.

From `training.learning_rate` in the YAML to the optimizer: `Schedule.of` reads the recipe, `learning_rate`
gives the rate of an update, and `trainer.SupervisedTrainer.create_scheduler` applies it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sft_pipeline.training.config import ModelConfig, TrainingConfig

ADAPTER_RATE, FULL_RATE = 1e-4, 2e-5


@dataclass(frozen=True)
class Schedule:
    """How the rate moves between `peak` (training.learning_rate) and `minimum` (training.min_learning_rate).

    warmup and decay are fractions of the updates; decay is read by wsd alone.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"]
    peak: float
    minimum: float = 0.0
    warmup: float = 0.0
    decay: float = 0.2

    @classmethod
    def of(cls, training: TrainingConfig, model: ModelConfig) -> "Schedule":
        peak = training.learning_rate or (FULL_RATE if model.parameterization == "full" else ADAPTER_RATE)
        return cls(
            training.schedule, peak, min(training.min_learning_rate, peak), training.warmup, training.decay
        )


def learning_rate(update: int, total: int, schedule: Schedule) -> float:
    """The learning rate with which update 0, 1, ..., total - 1 is made.

    Warm-up rises linearly, its first update already above zero, to the peak at the first update after it.
    Then: cosine and linear fall to the minimum at `total` (cosine from 2e-4 to 0 over 1,000 updates is 1e-4
    at update 500); constant stays; wsd stays, and falls linearly in its last `decay` share (Hu et al. 2024).
    """
    warm = warm_up(total, schedule)
    if update < warm:
        return schedule.peak * (update + 1) / (warm + 1)
    span = schedule.peak - schedule.minimum
    done = min(1.0, (update - warm) / max(1, total - warm))
    if schedule.kind == "cosine":
        return schedule.minimum + span * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.kind == "linear":
        return schedule.minimum + span * (1 - done)
    if schedule.kind == "wsd":
        falling = round(schedule.decay * total)
        left = total - update
        return schedule.peak if left >= falling else schedule.minimum + span * left / falling
    return schedule.peak


def curve(total: int, schedule: Schedule) -> list[float]:
    """The rate of every update, for a plot before the run."""
    return [learning_rate(update, total, schedule) for update in range(total)]


def warm_up(total: int, schedule: Schedule) -> int:
    """Updates of the warm-up: the first one after it has the peak rate."""
    return round(schedule.warmup * total)


def sampled(total: int, schedule: Schedule, most: int = 50) -> list[tuple[int, float]]:
    """(update counted from 1, rate) of at most `most` updates: both ends, the peak, and evenly between."""
    if total <= most:
        at = list(range(total))
    else:
        even = {round(i * (total - 1) / (most - 2)) for i in range(most - 1)}
        at = sorted(even | {min(warm_up(total, schedule), total - 1)})
    return [(update + 1, learning_rate(update, total, schedule)) for update in at]

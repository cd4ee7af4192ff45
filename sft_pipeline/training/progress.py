"""What a training tells, and what it asks of others: numbers of an update, who listens, who saves and restores."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from sft_pipeline.training.config import TrainingConfig


@dataclass(frozen=True)
class UpdateNumbers:
    """What one update was. `step` counts from 1; tokens are without padding; counts are over all ranks."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int
    supervised: int
    seconds: float


class Listener(Protocol):
    """Who watches a training. Every rank has one, so that they decide alike."""

    def updated(self, numbers: UpdateNumbers) -> None: ...
    def evaluated(self, step: int, val_loss: float) -> None: ...
    def should_stop(self) -> bool: ...


class NotFinite(Exception):
    """The loss or the gradient is NaN or infinite.

    Attributes:
        applied: Whether the update was made before that was seen, as only a validation loss can show it.
    """

    def __init__(self, step: int, what: str, value: float, *, applied: bool = False) -> None:
        super().__init__(f"{what} of update {step} is {value}")
        self.step, self.what, self.value, self.applied = step, what, value, applied


@dataclass(frozen=True)
class Intervals:
    """Updates between evaluations and between checkpoints; the last update has both."""

    total: int
    evaluate: int
    save: int

    @classmethod
    def of(cls, training: TrainingConfig, total: int) -> "Intervals":
        evaluate = training.eval_steps or max(1, math.ceil(total / 10))
        return cls(total, evaluate, training.save_steps or evaluate)

    def evaluates(self, step: int) -> bool:
        return step % self.evaluate == 0 or step == self.total

    def saves(self, step: int) -> bool:
        return step % self.save == 0 or step == self.total


class Saver(Protocol):
    """Writes a checkpoint of a trainer, atomically."""

    def __call__(self, trainer: Any) -> None: ...


class Restorer(Protocol):
    """Puts back what a checkpoint holds beside the weights. `step` is the last update it has seen."""

    step: int

    def optimizer(self, trainer: Any) -> None: ...
    def rng(self, trainer: Any) -> None: ...

"""Numbers of a training: of an update, curves over updates, when to evaluate and save. Light: no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.training.config import TrainingConfig

CURVE_SCHEMA = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class UpdateNumbers:
    """What one update was. `step` counts from 1; tokens are without padding; counts are over all ranks.

    `applied` is False where fp16's gradient scaler skipped the update, because its gradient overflowed.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int
    supervised: int
    seconds: float
    applied: bool = True


class Listener:
    """Who watches a training. Every rank has one, so that they decide alike. This base ignores everything."""

    def updated(self, numbers: UpdateNumbers) -> None:
        """An update was made; called before the evaluation of the same update."""

    def evaluated(self, step: int, val_loss: float) -> None:
        """The validation loss after update `step`; 0 is before the first."""

    def should_stop(self) -> bool:
        """Asked after each evaluation."""
        return False


class NotFinite(Exception):
    """The loss or the gradient is NaN or infinite.

    Attributes:
        applied: Whether the update was made before that was seen, as only a validation loss can show it.
    """

    def __init__(self, step: int, what: str, value: float, *, applied: bool = False) -> None:
        super().__init__(f"{what} of update {step} is {value}")
        self.step, self.applied = step, applied


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


class Curves:
    """Values over steps, by name: what a run of the same recipe repeats exactly."""

    def __init__(self) -> None:
        self._values: dict[str, Curve] = {}

    def add(self, step: int, **values: float) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append((step, float(value)))

    def get(self, name: str) -> Curve:
        return self._values.get(name, [])

    def total(self, name: str) -> int:
        return int(sum(v for _, v in self.get(name)))

    def write(self, path: Path) -> None:
        """Long format, ordered by name and step."""
        rows = [(s, n, v) for n in sorted(self._values) for s, v in self._values[n]]
        columns = [pa.array([r[i] for r in rows], type=f.type) for i, f in enumerate(CURVE_SCHEMA)]
        pq.write_table(pa.Table.from_arrays(columns, schema=CURVE_SCHEMA), path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> "Curves":
        curves = cls()
        for row in pq.read_table(path).to_pylist():
            curves.add(row["step"], **{row["name"]: row["value"]})
        return curves

"""Watching a training: its curves, its speed, when to stop early, and samples of what the model says."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.reporting import Reporter
from sft_pipeline.training.config import EarlyStopping
from sft_pipeline.training.progress import UpdateNumbers
from sft_pipeline.training.used_memory import memory_mb

CURVE_SCHEMA = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
Curve = list[tuple[int, float]]


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


class Watch:
    """Listens to the trainer on every rank; only rank 0's reporter is heard.

    Args:
        total: Planned updates.
        sampler: Makes sample generations: dicts of prompt, reply, expected. None on other ranks.
        mfu: Model FLOPs utilization of an update (`learning.flops`), or None where it is not known.
        speed_log: Where throughput is kept beside the checkpoints, so that a resumed run has the whole curve.
    """

    def __init__(
        self,
        *,
        total: int,
        report: Reporter,
        curves: Curves | None = None,
        early_stopping: EarlyStopping | None = None,
        sampler: Callable[[], Sequence[dict[str, Any]]] | None = None,
        mfu: Callable[[UpdateNumbers], float] | None = None,
        speed_log: Path | None = None,
        resumed_at: int = 0,
    ) -> None:
        self.total, self.report, self.sampler, self.early_stopping = total, report, sampler, early_stopping
        self.curves = curves or Curves()
        self.samples: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self._pace: float | None = None
        self._mfu = mfu
        self._speed_log = speed_log
        self.speed = _read_speed(speed_log, before=resumed_at) if speed_log else []
        if speed_log:
            _rewrite(speed_log, self.speed)

    # Listener

    def updated(self, numbers: UpdateNumbers) -> None:
        n = numbers
        self.curves.add(
            n.step,
            loss=n.loss,
            learning_rate=n.learning_rate,
            grad_norm=n.grad_norm,
            examples=n.examples,
            tokens=n.tokens,
            supervised_tokens=n.supervised,
        )
        self._pace = n.seconds if self._pace is None else 0.9 * self._pace + 0.1 * n.seconds
        seconds = max(n.seconds, 1e-9)
        speed = {
            "tokens_per_second": n.tokens / seconds,
            "supervised_tokens_per_second": n.supervised / seconds,
            "memory_mb": memory_mb(),
            "seconds": n.seconds,
            **({"mfu": self._mfu(n)} if self._mfu else {}),
        }
        self._keep_speed(n.step, speed)
        live = {k: v for k, v in speed.items() if k != "seconds"}
        self.report.metrics(
            {
                "loss": n.loss,
                "learning_rate": n.learning_rate,
                "grad_norm": n.grad_norm,
                "supervised_tokens": n.supervised,
                **live,
                "eta_seconds": (self.total - n.step) * self._pace,
            },
            n.step,
        )
        self.report.progress("training", n.step, self.total, "updates")

    def evaluated(self, step: int, val_loss: float) -> None:
        self.curves.add(step, val_loss=val_loss)
        self.report.metrics({"val_loss": val_loss}, step)
        if self.sampler is not None:
            self.samples = list(self.sampler())
            self.report.samples(self.samples, step)

    def should_stop(self) -> bool:
        return self.stop_reason() is not None

    # Judgement

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the lowest, the earliest on a tie; the untrained model does not count."""
        seen = [(s, v) for s, v in self.curves.get("val_loss") if s > 0]
        return min(seen, key=lambda x: (x[1], x[0])) if seen else None

    def stop_reason(self) -> str | None:
        """Why early stopping ends the run here; None while it goes on."""
        rule, seen = self.early_stopping, self.curves.get("val_loss")
        if rule is None or not seen:
            return None
        best, since = seen[0][1], 0
        for _, value in seen[1:]:
            if value < best - rule.min_delta:
                best, since = value, 0
            else:
                since += 1
        if since < rule.patience:
            return None
        return f"early stopping: the validation loss has not improved on {best:.4f} by more than {rule.min_delta:g} in {since} evaluations"

    def _keep_speed(self, step: int, values: dict[str, float]) -> None:
        entry = {"step": step, **values}
        self.speed.append(entry)
        if self._speed_log:
            with self._speed_log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")


def _read_speed(path: Path, before: int) -> list[dict[str, float]]:
    """Throughput up to the step that is resumed from; a half-written last line is dropped."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["step"] <= before:
                entries.append(entry)
    return entries


def _rewrite(path: Path, entries: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")


def write_throughput(entries: list[dict[str, float]], path: Path) -> None:
    """throughput.parquet: step, name, value. Of this machine and this day."""
    curves = Curves()
    for entry in entries:
        curves.add(int(entry["step"]), **{k: v for k, v in entry.items() if k != "step"})
    curves.write(path)

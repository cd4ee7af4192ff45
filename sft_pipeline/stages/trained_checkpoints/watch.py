"""Watching a training: its curves, its speed, when to stop early, and sample generations."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sft_pipeline.reporting import Reporter
from sft_pipeline.training.config import EarlyStopping
from sft_pipeline.training.memory import memory_mb
from sft_pipeline.training.progress import Curves, Listener, UpdateNumbers


class Watch(Listener):
    """Listens to the trainer on every rank; only rank 0's reporter is heard.

    Args:
        total: Planned updates.
        sampler: Makes sample generations: dicts of prompt, reply, expected. None on other ranks.
        mfu: Model FLOPs utilization of an update (`training.flops`), or None where it is not known.
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
        self._pace: float | None = None
        self._mfu = mfu
        self._speed_log = speed_log
        self.speed: list[dict[str, float]] = []
        if speed_log:
            self.speed = _read_speed(speed_log, until=resumed_at)
            speed_log.parent.mkdir(parents=True, exist_ok=True)
            speed_log.write_text("".join(json.dumps(e) + "\n" for e in self.speed), encoding="utf-8")

    # Listener

    def updated(self, numbers: UpdateNumbers) -> None:
        n = numbers
        curves = {"loss": n.loss, "learning_rate": n.learning_rate, "grad_norm": n.grad_norm}
        counts = {"examples": n.examples, "tokens": n.tokens, "supervised_tokens": n.supervised}
        self.curves.add(n.step, **curves, **counts)
        if not n.applied:
            self.curves.add(n.step, skipped=1)
        self._pace = n.seconds if self._pace is None else 0.9 * self._pace + 0.1 * n.seconds
        seconds = max(n.seconds, 1e-9)
        speed = {
            "tokens_per_second": n.tokens / seconds,
            "supervised_tokens_per_second": n.supervised / seconds,
            "memory_mb": memory_mb(),
            **({"mfu": self._mfu(n)} if self._mfu else {}),
        }
        entry = {"step": n.step, **speed, "seconds": n.seconds}
        self.speed.append(entry)
        if self._speed_log:
            with self._speed_log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        eta = (self.total - n.step) * self._pace
        live = {**curves, "supervised_tokens": n.supervised, **speed, "eta_seconds": eta}
        self.report.metrics(live, n.step)
        self.report.progress("training", n.step, self.total, "updates")

    def evaluated(self, step: int, val_loss: float) -> None:
        self.curves.add(step, val_loss=val_loss)
        self.report.metrics({"val_loss": val_loss}, step)
        if self.sampler is not None:
            self.samples = list(self.sampler())
            self.report.samples(self.samples, step)

    def should_stop(self) -> bool:
        return self.stop_reason() is not None

    # Early stopping

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the lowest, the earliest on a tie; without the untrained model."""
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
        return (
            f"early stopping: the validation loss has not improved on {best:.4f} "
            f"by more than {rule.min_delta:g} in {since} evaluations"
        )


def _read_speed(path: Path, until: int) -> list[dict[str, float]]:
    """Throughput up to the step that is resumed from; a half-written last line is dropped."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return [entry for entry in entries if entry["step"] <= until]


def write_throughput(entries: list[dict[str, float]], path: Path) -> None:
    """throughput.parquet: step, name, value. Of this machine and this day."""
    curves = Curves()
    for entry in entries:
        curves.add(int(entry["step"]), **{k: v for k, v in entry.items() if k != "step"})
    curves.write(path)

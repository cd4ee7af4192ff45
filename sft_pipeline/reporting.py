"""How a stage reports, without knowing to whom: a terminal, Dagster's event log, MLflow, a file."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sft_pipeline.secret_text import redacted

T = TypeVar("T")


class Reporter:
    """What a stage reports to. This base class ignores everything."""

    def log(self, message: str, level: str = "info") -> None:
        """One line for people. Levels: debug, info, warning, error."""

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        """`done` of `total` units of the work called `name`; total None where it is not known."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers over training steps (optimizer updates)."""

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Sample generations at a training step: dicts of prompt, reply, expected."""

    def stage(self, asset: str, state: str) -> None:
        """An asset's state changed: "started", "built", "cached", "not accepted" or "failed"."""

    def track(self, items: Iterable[T], name: str, total: float | None, unit: str = "rows") -> Iterator[T]:
        """Yields the items, reporting progress by their number."""
        for done, item in enumerate(items, 1):
            yield item
            self.progress(name, done, total, unit)


class Tee(Reporter):
    """Passes everything on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def log(self, message: str, level: str = "info") -> None:
        for r in self.reporters:
            r.log(message, level)

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        for r in self.reporters:
            r.progress(name, done, total, unit)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        for r in self.reporters:
            r.metrics(values, step)

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for r in self.reporters:
            r.samples(rows, step)

    def stage(self, asset: str, state: str) -> None:
        for r in self.reporters:
            r.stage(asset, state)


class FileReporter(Reporter):
    """Appends events as JSON lines, for `replay` in another process; progress 5 times a second at most."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8", buffering=1)
        self._last_progress = 0.0

    def _write(self, kind: str, **event: Any) -> None:
        self._stream.write(
            json.dumps({"kind": kind, "time": time.time(), "pid": os.getpid(), **event}, default=str) + "\n"
        )

    def log(self, message: str, level: str = "info") -> None:
        self._write("log", message=redacted(message), level=level)

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        now = time.monotonic()
        if now - self._last_progress > 0.2 or done == total:
            self._last_progress = now
            self._write("progress", name=name, done=done, total=total, unit=unit)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._write("metrics", values=dict(values), step=step)

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self._write("samples", rows=[dict(r) for r in rows], step=step)


def replay(line: str, reporter: Reporter) -> None:
    """Passes one line that a FileReporter wrote on to another reporter."""
    event = json.loads(line)
    kind = event["kind"]
    if kind in ("log", "progress", "metrics", "samples"):
        arguments = {name: value for name, value in event.items() if name not in ("kind", "time", "pid")}
        getattr(reporter, kind)(**arguments)

"""Progress on a terminal: one line per asset, a bar for what is long; else plain lines."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sft_pipeline.reporting import Reporter
from sft_pipeline.secret_text import redacted

MARKS = {
    "built": ("✔", "green"),
    "cached": ("=", "cyan"),
    "not accepted": ("✘", "red"),
    "failed": ("✘", "red"),
}

LEVELS = "▁▂▃▄▅▆▇█"


def printable(text: str) -> str:
    """A message without what a terminal would obey: names of files may hold control characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class Terminal(Console):
    """A console that prints texts as they are: no markup in them, and nothing that a terminal would obey.

    A name of a file or a snapshot that holds "[/red]" or a control sequence neither raises nor gives orders.
    Line breaks stay, since messages have them. Styles are given as `style=` or as `Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def sparkline(values: Sequence[float]) -> str:
    """A curve of values that are not negative, one character each; the highest value has the full height."""
    top = max(values, default=0.0) or 1.0
    return "".join(LEVELS[round(value / top * (len(LEVELS) - 1))] for value in values)


class ConsoleReporter(Reporter):
    """A reporter for `sft run`; use as a context manager."""

    def __init__(self, console: Console, every_seconds: float = 5.0) -> None:
        self._console = console
        self._every = every_seconds
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._latest: dict[str, float] = {}

    def __enter__(self) -> "ConsoleReporter":
        self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._live.stop()

    def stage(self, asset: str, state: str) -> None:
        if state == "started":
            self._started[asset] = time.monotonic()
            self._clear()
            self._task(asset, None)
            return
        seconds = time.monotonic() - self._started.get(asset, time.monotonic())
        self._clear()
        took = (f"{state}, {seconds:.1f} s", "dim")
        self._console.print(Text.assemble(MARKS[state], f" {printable(asset)} ", took))

    def log(self, message: str, level: str = "info") -> None:
        style = {"warning": "yellow", "error": "red", "debug": "dim"}.get(level, "")
        if level != "debug":
            self._console.print(f"  {redacted(message)}", style=style)

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        amount = f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"
        if "loss" in self._latest and name.startswith("training"):
            amount += f"  loss {self._latest['loss']:.4f}"
        self._live.update(self._task(name, total), completed=done, total=total, amount=amount)
        if not self._console.is_terminal and (
            time.monotonic() - self._last.setdefault(name, time.monotonic()) > self._every
        ):
            self._last[name] = time.monotonic()
            self._console.print(f"  {name}: {amount}")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._latest.update(values)
        if "val_loss" in values:
            self._console.print(f"  update {step}: validation loss {values['val_loss']:.4f}")

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if rows:
            self._console.print(f"  sample: {rows[0].get('reply', '')!s:.150}", style="dim")

    def _task(self, name: str, total: float | None) -> TaskID:
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(name, total=total, amount="")
        return self._tasks[name]

    def _clear(self) -> None:
        for task in self._tasks.values():
            self._live.remove_task(task)
        self._tasks.clear()
        self._last.clear()
        self._latest.clear()

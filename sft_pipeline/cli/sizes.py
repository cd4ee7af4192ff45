"""Sizes, ages and counts as people read them, and tables that fit a terminal."""

from collections.abc import Sequence
from datetime import UTC, datetime

from rich import box
from rich.table import Table

UNITS = ("B", "kB", "MB", "GB", "TB")


def size_text(size: float) -> str:
    """Of bytes, in powers of 1,000: 12.3 MB."""
    for unit in UNITS:
        if abs(size) < 1000 or unit == UNITS[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def seconds_since(created_at: str, now: datetime | None = None) -> float:
    """Since an ISO time."""
    return max(0.0, ((now or datetime.now(UTC)) - datetime.fromisoformat(created_at)).total_seconds())


def duration_text(seconds: float | None) -> str:
    """45 s, 12 min, 3.3 h, 5 d."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 36 else f"{hours / 24:.0f} d"


def plural(count: int, noun: str) -> str:
    """1 artifact, 2 artifacts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def table_of(columns: Sequence[str], *, title: str | None = None) -> Table:
    """A table without frames. A column that ends in ">" is set to the right, one that ends in "!" stays whole
    where the terminal is too narrow for all.
    """
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        table.add_column(
            column.rstrip(">!"),
            justify="right" if column.endswith(">") else "left",
            no_wrap=column.endswith((">", "!")),
            overflow="fold",
        )
    return table

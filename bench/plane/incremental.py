"""What a new snapshot costs: A cold, then B with one row in a hundred edited in the same store, and B cold in another."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plane import rows
from plane.measure import Measured, measure
from plane.report import mib, table
from plane.side_by_side import MAX_LENGTH
from plane.sides import Job

EDITED_EVERY = 100


@dataclass(frozen=True)
class Incremental:
    """The three builds of one size."""

    rows: int
    cold_a: Measured
    after_a: Measured
    cold_b: Measured

    @property
    def same(self) -> dict[str, bool]:
        """Whether a stage made the same of B with and without A before it."""
        with_a, without = (m.figures["data_versions"] for m in (self.after_a, self.cold_b))
        return {name: with_a[name] == without[name] for name in without}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same_data_versions": self.same}


def run(count: int, tokenizer: str) -> Incremental:
    """Builds the three, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        rows.write(rows.synthetic("gsm8k_like", count), Path(folder) / "A")
        rows.write(rows.edited(rows.synthetic("gsm8k_like", count), EDITED_EVERY), Path(folder) / "B")
        for name in ("A", "B"):  # a snapshot holds the flat file only
            (sources / name).mkdir(parents=True)
            (Path(folder) / name / "flat.jsonl").rename(sources / name / "rows.jsonl")

        def build(store: str, snapshot: str) -> Measured:
            return measure(
                Job("ours", str(sources), tokenizer, f"{folder}/{store}", MAX_LENGTH, {"snapshot": snapshot})
            )

        return Incremental(count, build("store", "A"), build("store", "B"), build("other_store", "B"))


def show(found: Incremental) -> str:
    """Seconds per stage, and whether the stage's data are the same."""
    columns = {"A cold": found.cold_a, "B after A": found.after_a, "B cold": found.cold_b}
    names = list(found.same)
    lines = [
        [
            name,
            *(f"{m.figures['stages'][name]:.2f}" for m in columns.values()),
            _share(found.after_a.figures["stages"][name], found.cold_b.figures["stages"][name]),
            "yes" if found.same[name] else "NO",
        ]
        for name in names
    ]
    lines.append(
        [
            "all",
            *(f"{m.seconds:.2f}" for m in columns.values()),
            _share(found.after_a.seconds, found.cold_b.seconds),
            "yes" if all(found.same.values()) else "NO",
        ]
    )
    lines.append(["peak RSS MiB", *(mib(m.rss) for m in columns.values()), "", ""])
    for count in ("reused", "tokenized"):
        lines.append([f"rows {count}", *(_count(m, count) for m in columns.values()), "", ""])
    return table(["seconds", *columns, "B after A / B cold", "same data"], lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"


def _count(measured: Measured, name: str) -> str:
    """A count of tokenized_rows; a version that does not reuse rows has none."""
    counts = measured.figures["counts"]["tokenized_rows"]
    value = counts.get(f"rows_{name}", counts.get(name))
    return "–" if value is None else f"{value:,}"

"""What a new snapshot costs: A cold, then B with one row in a hundred edited after A, and B cold in a store of its own."""

import shutil
import statistics
import tempfile
from collections.abc import Sequence
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
    """The builds of one size: A once, B once per round after A and once per round cold."""

    rows: int
    cold_a: Measured
    after_a: Sequence[Measured]
    cold_b: Sequence[Measured]

    @property
    def same(self) -> dict[str, bool]:
        """Whether a stage made the same of B every time, with and without A before it."""
        builds = [m.figures["data_versions"] for m in (*self.after_a, *self.cold_b)]
        return {name: len({versions[name] for versions in builds}) == 1 for name in builds[0]}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same_data_versions": self.same}


def run(count: int, tokenizer: str, rounds: int) -> Incremental:
    """Builds them, each in a process of its own; every other round goes backwards."""
    with tempfile.TemporaryDirectory() as folder:
        sources, store, scratch = (Path(folder) / name for name in ("sources", "store", "scratch"))
        rows.write(rows.synthetic("gsm8k_like", count), Path(folder) / "A")
        rows.write(rows.edited(rows.synthetic("gsm8k_like", count), EDITED_EVERY), Path(folder) / "B")
        for name in ("A", "B"):  # a snapshot holds the flat file only
            (sources / name).mkdir(parents=True)
            (Path(folder) / name / "flat.jsonl").rename(sources / name / "rows.jsonl")

        def build(snapshot: str, into: Path) -> Measured:
            return measure(
                Job("ours", str(sources), tokenizer, str(into), MAX_LENGTH, {"snapshot": snapshot})
            )

        cold_a = build("A", store)
        found: dict[bool, list[Measured]] = {True: [], False: []}
        for turn in range(rounds):
            for warm in (True, False) if turn % 2 == 0 else (False, True):
                if warm:
                    shutil.copytree(store, scratch)
                found[warm].append(build("B", scratch))
                shutil.rmtree(scratch)
        return Incremental(count, cold_a, found[True], found[False])


def show(found: Incremental) -> str:
    """Seconds per stage (medians over the rounds, and of the rounds' own ratios), and whether the data are the same."""
    lines = [
        _line(found, name, lambda m, name=name: m.figures["stages"][name], found.same[name])
        for name in found.same
    ]
    lines.append(_line(found, "all", lambda m: m.seconds, all(found.same.values())))
    builds = ([found.cold_a], found.after_a, found.cold_b)
    lines.append(["peak RSS MiB", *(mib(max(m.rss for m in runs)) for runs in builds), "", ""])
    for count in ("reused", "tokenized"):
        lines.append([f"rows {count}", *(_count(runs[0], count) for runs in builds), "", ""])
    return table(["seconds", "A cold", "B after A", "B cold", "B after A / B cold", "same data"], lines)


def _line(found: Incremental, name: str, seconds: Any, same: bool) -> list[str]:
    runs = ([found.cold_a], found.after_a, found.cold_b)
    shares = [seconds(a) / seconds(b) for a, b in zip(found.after_a, found.cold_b, strict=True)]
    spread = f" ({min(shares):.0%} to {max(shares):.0%})" if len(shares) > 1 else ""
    return [
        name,
        *(f"{statistics.median(map(seconds, r)):.2f}" for r in runs),
        f"{statistics.median(shares):.0%}{spread}",
        "yes" if same else "NO",
    ]


def _count(measured: Measured, name: str) -> str:
    """A count of tokenized_rows; a version that does not reuse rows has none."""
    counts = measured.figures["counts"]["tokenized_rows"]
    value = counts.get(f"rows_{name}", counts.get(name))
    return "–" if value is None else f"{value:,}"

"""Several sides over the same rows, taking turns."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plane.measure import Measured, measure
from plane.report import mib, table
from plane.sides import Job

OURS = {
    "sft_pipeline": {"near_duplicates": False},
    "sft_pipeline + near-duplicates": {"near_duplicates": True},
}
PEERS = {"TRL preparation": "trl", "bare encode_batch": "encode_batch"}
MAX_LENGTH = 1024
HEADER = (
    "",
    "seconds",
    "with imports",
    "rows/s",
    "tokens/s",
    "peak RSS MiB",
    "peak PSS MiB",
    "blocks",
    "full",
    "rows out",
)

Rounds = dict[str, list[Measured]]


def take_turns(rows: Path, tokenizer: str, names: Sequence[str], rounds: int) -> Rounds:
    """Measures every side once per round; every other round goes backwards, so that a drift of the machine cancels."""
    found: Rounds = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(measure(_job(name, rows, tokenizer, scratch)))
    return found


def _job(name: str, rows: Path, tokenizer: str, scratch: str) -> Job:
    side, options = ("ours", OURS[name]) if name in OURS else (PEERS[name], {})
    return Job(side, str(rows), tokenizer, scratch, MAX_LENGTH, options)


def show(found: Mapping[str, Sequence[Measured]], rows: int) -> str:
    """One line per side: medians over the rounds."""
    peers = {name: side for name, side in PEERS.items() if name in found}
    lines = [
        [name, *_cells(runs, rows), *(_speed(runs, found[peer], name == peer) for peer in peers)]
        for name, runs in found.items()
    ]
    return table([*HEADER, *(f"speed / {side}" for side in peers.values())], lines)


def _cells(runs: Sequence[Measured], rows: int) -> list[str]:
    seconds = statistics.median(r.seconds for r in runs)
    figures = runs[0].figures
    blocks = figures.get("blocks")
    return [
        f"{seconds:.2f}",
        f"{statistics.median(r.with_imports for r in runs):.2f}",
        f"{rows / seconds:,.0f}",
        f"{figures['tokens'] / seconds:,.0f}",
        mib(max(r.rss for r in runs)),
        mib(max((r.pss for r in runs if r.pss is not None), default=None)),
        f"{blocks:,}" if blocks else "–",
        f"{figures['tokens'] / (blocks * MAX_LENGTH):.2%}" if blocks else "–",
        f"{figures['rows']:,}",
    ]


def _speed(runs: Sequence[Measured], peer: Sequence[Measured], same: bool) -> str:
    """How many times as fast as the peer: the median over the rounds' own ratios."""
    ratios = [p.seconds / r.seconds for r, p in zip(runs, peer, strict=True)]
    return "1" if same else f"{statistics.median(ratios):.2f}"


def to_json(found: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Every single measurement."""
    return {name: [asdict(run) for run in runs] for name, runs in found.items()}

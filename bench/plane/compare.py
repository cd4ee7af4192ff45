"""The comparisons: systems over the same rows, a new snapshot with few changes, a branch of a few rows."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import aim, median_and_spread, mib, table

from plane import rows
from plane.measure import BENCH, Measured, children_cpu, measure
from plane.systems import Job

OURS = "sft_pipeline"
WITH_SEARCH = "sft_pipeline + near-duplicates"
TRL = "TRL preparation"
ENCODE_BATCH = "bare encode_batch"
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("pipeline", {"near_duplicates": False}),
    WITH_SEARCH: ("pipeline", {"near_duplicates": True}),
    TRL: ("trl", {}),
    ENCODE_BATCH: ("encode_batch", {}),
}
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
)
AIM_ROWS = 50_000  # of fewer rows most seconds are spent once, and no speed is aimed at
TIMES_TRL, TIMES_ENCODE_BATCH, MEMORY_MIB = 5.0, 1.0, 2_000_000_000 / (1 << 20)

EDITED_EVERY = 100
SHARE_OF_ENCODE_BATCH = 0.15

SMALL_ROWS, SMALL_CPU_SECONDS, CACHED_SECONDS = 60, 8.0, 5.0
SMALL_RECIPE: dict[str, Any] = {
    "name": "bench_small",
    "dataset": "bench_rows",
    "model": {"base": "data/base_model"},
    "tokens": {"max_length": 512, "overflow": "truncate_answer"},
    "sanity": {"skip": True},
    "training": {"max_steps": 2},
    "evaluation": {"require_improvement": False, "max_new_tokens": 4},
}

Rounds = dict[str, list[Measured]]


def take_turns(folder: Path, tokenizer: str, names: Sequence[str], rounds: int) -> Rounds:
    """Each system once per round; every other round goes backwards, so that the machine's drift cancels."""
    found: Rounds = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            system, options = SYSTEMS[name]
            with tempfile.TemporaryDirectory() as scratch:
                job = Job(system, str(folder), tokenizer, scratch, MAX_LENGTH, options)
                found[name].append(measure(job))
    return found


def ratios(runs: Sequence[Measured], peer: Sequence[Measured]) -> list[float]:
    """Seconds over those of the peer, round by round."""
    return [r.seconds / p.seconds for r, p in zip(runs, peer, strict=True)]


def show_systems(found: Mapping[str, Sequence[Measured]], count: int) -> str:
    """One line per system, medians over the rounds, and below them the aims."""
    peers = [name for name in (TRL, ENCODE_BATCH) if name in found]
    lines = []
    for name, runs in found.items():
        seconds, figures = statistics.median(r.seconds for r in runs), runs[0].figures
        blocks = figures.get("blocks")
        lines.append(
            [
                name,
                f"{seconds:.2f}",
                f"{statistics.median(r.with_imports for r in runs):.2f}",
                f"{count / seconds:,.0f}",
                f"{figures['tokens'] / seconds:,.0f}",
                mib(max(r.rss for r in runs)),
                mib(max((r.pss for r in runs if r.pss is not None), default=None)),
                f"{blocks:,}" if blocks else "–",
                f"{figures['tokens'] / (blocks * MAX_LENGTH):.2%}" if blocks else "–",
                *(median_and_spread([1 / r for r in ratios(runs, found[peer])]) for peer in peers),
            ]
        )
    report = [table([*HEADER, *(f"speed / {peer}" for peer in peers)], lines), ""]
    for name in (OURS, WITH_SEARCH):
        if name in found and TRL in found and count >= AIM_ROWS:
            times = [1 / r for r in ratios(found[name], found[TRL])]
            report.append(aim(f"{name}: rows/s over those of TRL", times, least=TIMES_TRL))
        if name in found and ENCODE_BATCH in found and count >= AIM_ROWS:
            share = ratios(found[name], found[ENCODE_BATCH])
            report.append(aim(f"{name}: seconds over those of encode_batch", share, most=TIMES_ENCODE_BATCH))
        if name in found:
            memory = [max(r.rss for r in found[name])]
            report.append(aim(f"{name}: peak MiB of the process tree", memory, most=round(MEMORY_MIB)))
    return "\n".join(report)


@dataclass(frozen=True)
class Incremental:
    """Builds of snapshots A and B, where B has one row in `EDITED_EVERY` changed.

    Attributes:
        rows: Of a snapshot.
        cold_a: A in an empty store.
        after_a: B in a store that holds A, once per round.
        cold_b: B in an empty store, once per round.
        bare: `encode_batch` of all rows of B, once per round.
    """

    rows: int
    cold_a: Measured
    after_a: Sequence[Measured]
    cold_b: Sequence[Measured]
    bare: Sequence[Measured]

    @property
    def same(self) -> dict[str, bool]:
        """Whether a stage made the same files of B every time, with and without A before it."""
        builds = [m.figures["data_versions"] for m in (*self.after_a, *self.cold_b)]
        return {name: len({versions[name] for versions in builds}) == 1 for name in builds[0]}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "same_data_versions": self.same}


def measure_incremental(count: int, tokenizer: str, rounds: int) -> Incremental:
    """Builds them, each in a process of its own; every other round goes backwards."""
    with tempfile.TemporaryDirectory() as folder:
        sources, store, scratch = (Path(folder) / name for name in ("sources", "store", "scratch"))
        rows.write(rows.synthetic("gsm8k_like", count), sources / "A", messages=False)
        edited = rows.edited(rows.synthetic("gsm8k_like", count), EDITED_EVERY)
        rows.write(edited, sources / "B", messages=False)

        def build(snapshot: str, into: Path) -> Measured:
            options = {"snapshot": snapshot}
            return measure(Job("pipeline", str(sources), tokenizer, str(into), MAX_LENGTH, options))

        def after_a() -> Measured:
            shutil.copytree(store, scratch)
            return build("B", scratch)

        def bare() -> Measured:
            scratch.mkdir()
            return measure(Job("encode_batch", str(sources / "B"), tokenizer, str(scratch), MAX_LENGTH))

        kinds: tuple[Callable[[], Measured], ...] = (after_a, lambda: build("B", scratch), bare)
        cold_a = build("A", store)
        found: list[list[Measured]] = [[], [], []]
        for turn in range(rounds):
            for kind in range(3) if turn % 2 == 0 else reversed(range(3)):
                found[kind].append(kinds[kind]())
                shutil.rmtree(scratch)
        return Incremental(count, cold_a, *found)


def show_incremental(found: Incremental) -> str:
    """Seconds per stage, medians over the rounds and ratios within a round, and below them the aims."""
    builds = ([found.cold_a], found.after_a, found.cold_b)

    def line(name: str, seconds: Callable[[Measured], float], same: bool) -> list[str]:
        cold = [seconds(a) / seconds(b) for a, b in zip(found.after_a, found.cold_b, strict=True)]
        bare = [seconds(a) / b.seconds for a, b in zip(found.after_a, found.bare, strict=True)]
        medians = (f"{statistics.median(map(seconds, runs)):.2f}" for runs in builds)
        ratios = (median_and_spread(values, ".0%") for values in (cold, bare))
        return [name, *medians, *ratios, "yes" if same else "NO"]

    def tokenized(measured: Measured, name: str) -> int:
        return measured.figures["counts"]["tokenized_rows"][f"rows_{name}"]

    lines = [
        line(name, lambda m, name=name: m.figures["stages"][name], same) for name, same in found.same.items()
    ]
    lines.append(line("all", lambda m: m.seconds, all(found.same.values())))
    lines.append(["peak RSS MiB", *(mib(max(m.rss for m in runs)) for runs in builds), "", "", ""])
    for name in ("reused", "tokenized"):
        lines.append([f"rows {name}", *(f"{tokenized(runs[0], name):,}" for runs in builds), "", "", ""])
    header = [
        "seconds",
        "A cold",
        "B after A",
        "B cold",
        "B after A / B cold",
        "B after A / encode_batch",
        "same data",
    ]
    changed = len(range(0, found.rows, EDITED_EVERY))
    exactly = all(tokenized(m, "tokenized") == changed for m in found.after_a)
    shares = [
        a.figures["stages"]["tokenized_rows"] / b.seconds
        for a, b in zip(found.after_a, found.bare, strict=True)
    ]
    report = [
        table(header, lines),
        "",
        f"encode_batch of all rows: {median_and_spread([m.seconds for m in found.bare])} s",
        f"- exactly the {changed:,} changed rows are tokenized again: {'yes' if exactly else 'NO'}",
        f"- every file of B equals that of a cold build: {'yes' if all(found.same.values()) else 'NO'}",
    ]
    if found.rows >= AIM_ROWS:
        what = "seconds of tokenized_rows over those of encode_batch"
        report.append(aim(what, shares, most=SHARE_OF_ENCODE_BATCH))
    return "\n".join(report)


def measure_small(rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU seconds, wall seconds) per round of a branch of 60 rows on the embedded base model."""
    found: dict[str, list[tuple[float, float]]] = {}
    tokenizer = str(BENCH.parent / "data" / "base_model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows.write(rows.synthetic("gsm8k_like", SMALL_ROWS), folder / "rows")
        dataset = {
            "name": "bench_rows",
            "sources": [{"path": str(folder / "rows" / "flat.jsonl"), "static": True}],
            "split": {"validation": 0.2, "test": 0.2},
        }
        for kind, config in (("datasets", dataset), ("recipes", SMALL_RECIPE)):
            (folder / kind).mkdir()
            (folder / kind / "bench_small.yaml").write_text(json.dumps(config))  # JSON is YAML

        def command(home: str, *until: str) -> tuple[float, float]:
            environment = {
                **os.environ,
                "SFT_PROJECT_ROOT": str(BENCH.parent),
                "SFT_CONFIG_PATH": name,
                "SFT_HOME": f"{name}/{home}",
                "HF_HUB_OFFLINE": "1",
            }
            cpu, began = children_cpu(), time.monotonic()
            call = [sys.executable, "-m", "sft_pipeline.cli", "run", "bench_small", *until]
            done = subprocess.run(call, env=environment, cwd=BENCH.parent, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"sft run ended with {done.returncode}:\n{done.stderr[-3000:]}")
            return children_cpu() - cpu, time.monotonic() - began

        command("whole")
        for turn in range(rounds):
            with tempfile.TemporaryDirectory() as scratch:
                own = measure(Job("pipeline", str(folder / "rows"), tokenizer, scratch, 512))
            figures = {
                "plain functions, packed_shards": (own.cpu, own.with_imports),
                "sft run --until packed_shards": command(f"packed-{turn}", "--until", "packed_shards"),
                "sft run, everything cached": command("whole"),
            }
            for what, pair in figures.items():
                found.setdefault(what, []).append(pair)
    return found


def show_small(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    cpu, wall = ({name: [pair[i] for pair in runs] for name, runs in found.items()} for i in (0, 1))
    lines = [[name, median_and_spread(cpu[name]), median_and_spread(wall[name])] for name in found]
    packed, cached = "plain functions, packed_shards", "sft run, everything cached"
    return "\n".join(
        [
            table(["", "CPU seconds", "wall seconds"], lines),
            "",
            aim(f"CPU seconds of {SMALL_ROWS} rows to packed_shards", cpu[packed], most=SMALL_CPU_SECONDS),
            aim("wall seconds of a cached sft run", wall[cached], most=CACHED_SECONDS),
        ]
    )

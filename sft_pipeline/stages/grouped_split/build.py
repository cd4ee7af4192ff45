"""Builds grouped_split: train, validation and test by group, with near-duplicates kept apart."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.leakage import Straddling, leaked, straddling
from sft_pipeline.stages.grouped_split.near_duplicates import ShingleSets
from sft_pipeline.stages.grouped_split.report import Outcome, checks, evidence, write_summary
from sft_pipeline.stages.grouped_split.shingles import texts_of
from sft_pipeline.stages.grouped_split.split import SIDES, Sides, first_times, overlap
from sft_pipeline.stages.grouped_split.summary import on_disk
from sft_pipeline.stages.grouped_split.write import write_sides
from sft_pipeline.stages.painter import Painter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.tables import parquet


def build(b: Build) -> Built:
    """Deals the groups to sides, drops near-duplicates of held-out rows, and writes the sides, rejects and split.json."""
    config: SplitConfig = b.config
    parts = b.inputs["validated_rows"].parts("rows")
    total = parquet.count_rows(parts)
    near = config.near_duplicates
    b.report.log(
        f"dealing {total:,} rows to sides"
        + (f" and searching near-duplicates at {near.threshold:g}" if near else "")
    )
    sides = Sides(
        config, first_times(parquet.read_batches(parts, ["group", "time"])) if config.time_cutoff else None
    )
    side = _deal(sides, parts)
    dropped = np.zeros(total, bool)
    found, leaks = Straddling.none(), None
    try:
        if near:
            sets = ShingleSets(_texts(b, parts, total), b.work / "sets")
            index = sets.index(near.threshold)
            found = straddling(sets, index, side)
            if near.action == "drop_from_train":
                dropped[found.row] = True
            # What is left, searched anew. That the files hold these very rows is seen when they are read back.
            leaks = leaked(sets, index, np.where(dropped, -1, side))
            del sets, index
    finally:
        shutil.rmtree(b.work / "sets", ignore_errors=True)
    handed, worst = write_sides(b, parts, side, dropped, found)
    held = {name: on_disk(sorted((b.out / name).glob("*.parquet"))) for name in SIDES}
    outcome = Outcome(
        read=total,
        rejects=parquet.count_rows([b.out / "rejects.parquet"]),
        near_duplicates=len(found.row),
        handed=handed,
        held=held,
        shared_groups=overlap([s.groups for s in held.values()]),
        fixed_missing=sides.fixed_missing,
        leaks=leaks,
        worst_pairs=worst,
    )
    with Painter() as painter:
        shown = evidence(b.out, outcome, painter)
        write_summary(b.out / "split.json", config, outcome)
    return Built(outcome.counts, checks(config, outcome), volatile=("plots/",), evidence=shown)


def _deal(sides: Sides, parts: list[Path]) -> np.ndarray:
    """The side of each row (int8)."""
    dealt = [sides.of_rows(batch.column("group")) for batch in parquet.read_batches(parts, ["group"])]
    return np.concatenate([np.zeros(0, np.int8), *dealt])


def _texts(b: Build, parts: list[Path], total: int) -> Iterator[pa.Array]:
    done = 0
    for batch in parquet.read_batches(parts, ["messages"]):
        yield texts_of(batch.column("messages"))
        done += batch.num_rows
        b.report.progress("shingle", done, total, "rows")

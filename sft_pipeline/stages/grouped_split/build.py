"""Builds grouped_split: train, validation and test by group, without near-duplicates between them."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.grouped_split.checks import (
    SplitOutcome,
    SplitSummary,
    checks,
    read_back,
    uneven_shares,
)
from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.near_duplicates import (
    CrossSplitDuplicates,
    cross_split_duplicates,
    leaked,
)
from sft_pipeline.stages.grouped_split.prefix_index import prefix_index
from sft_pipeline.stages.grouped_split.report import evidence
from sft_pipeline.stages.grouped_split.shingles import ShingleSets, texts_of
from sft_pipeline.stages.grouped_split.split import TRAIN, SplitAssignment, first_times, overlap
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.store.files import write_json
from sft_pipeline.tables import parquet
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import REJECTS, ROWS, SPLITS

# The contract calls a row's split its "side" here and in split.json.
EXCERPT = pa.schema([(name, pa.string()) for name in ("row_id", "group", "side", "text")])
PAIRS = pa.schema(
    [("similarity", pa.float64()), *((f"{of}{f.name}", f.type) for of in ("", "of_") for f in EXCERPT)]
)
EXCERPT_CHARACTERS = 500
WORST_PAIRS, WORST_CHARACTERS = 10, 200
LOOKED_AT_AGAIN = 300  # held-out rows of each split, after near-duplicates have been dropped


def build(b: Build) -> Built:
    """Assigns the groups to splits and drops near-duplicates of held-out rows, then writes all files."""
    config: SplitConfig = b.config
    parts = b.inputs["validated_rows"].parts("rows")
    total = parquet.count_rows(parts)
    near = config.near_duplicates
    search = f" and searching near-duplicates at {near.threshold:g}" if near else ""
    b.report.log(f"assigning {total:,} rows to splits{search}")
    times = first_times(parquet.read_batches(parts, ["group", "time"])) if config.time_cutoff else None
    assignment = SplitAssignment(config, times)
    by_batch = [assignment.of_rows(batch.column("group")) for batch in parquet.read_batches(parts, ["group"])]
    split = np.concatenate([np.zeros(0, np.int8), *by_batch])
    dropped = np.zeros(total, bool)
    found, leaks = CrossSplitDuplicates.none(), None
    try:
        if near:
            sets = ShingleSets(_texts(b, parts, total), b.work / "sets")
            index = prefix_index(sets, near.threshold)
            drops = near.action == "drop_from_train"
            found = cross_split_duplicates(
                sets,
                index,
                split,
                lambda done, total: b.report.progress("search near-duplicates", done, total, "pairs"),
                dropped=drops,
            )
            dropped[found.row] = drops
            # A second search over the rows that are left, the other way round: from held-out rows to train.
            # That the files hold exactly these rows is checked when they are read back.
            kept = np.where(dropped, -1, split).astype(np.int8)
            leaks = leaked(sets, index, kept, LOOKED_AT_AGAIN if drops else None)
            del sets, index
    finally:
        shutil.rmtree(b.work / "sets", ignore_errors=True)
    written, worst = write_splits(b, parts, split, dropped, found)
    on_disk = {name: read_back(sorted((b.out / name).glob("*.parquet"))) for name in SPLITS}
    outcome = SplitOutcome(
        read=total,
        rejects=parquet.count_rows([b.out / "rejects.parquet"]),
        near_duplicates=len(found.row),
        assigned={name: int((split == i).sum()) for i, name in enumerate(SPLITS)},
        dropped_from_train=int((dropped & (split == TRAIN)).sum()),
        written=written,
        on_disk=on_disk,
        shared_groups=overlap([s.groups for s in on_disk.values()]),
        fixed_missing=assignment.fixed_missing,
        leaks=leaks,
        worst_pairs=worst,
    )
    if off := uneven_shares(config, outcome):
        outcome = replace(outcome, uneven=off, largest_group=_largest_group(parts))
    write_json(b.out / "split.json", _summary(config, outcome))
    return Built(
        outcome.counts, checks(config, outcome), volatile=("plots/",), evidence=evidence(b.out, outcome)
    )


def _texts(b: Build, parts: list[Path], total: int) -> Iterator[pa.Array]:
    done = 0
    for batch in parquet.read_batches(parts, ["messages"]):
        yield texts_of(batch.column("messages"))
        done += batch.num_rows
        b.report.progress("shingle", done, total, "rows")


def _largest_group(parts: list[Path]) -> tuple[str, int]:
    """The group with the most rows, and how many it has."""
    rows: Counter[str] = Counter()
    for batch in parquet.read_batches(parts, ["group"], parquet.ROW_GROUP):
        rows.update({c["values"]: c["counts"] for c in pc.value_counts(batch.column("group")).to_pylist()})
    return rows.most_common(1)[0]


def write_splits(
    b: Build, parts: list[Path], split: np.ndarray, dropped: np.ndarray, found: CrossSplitDuplicates
) -> tuple[dict[str, SplitSummary], list[dict[str, Any]]]:
    """Writes train/, validation/, test/, rejects.parquet and near_duplicates.parquet, in the order of the
    rows.

    Args:
        split: Per row the split of its group, an index into SPLITS (int8).
        dropped: Which rows become rejects (bool).

    Returns:
        (what each split's writer was given, the most similar pairs).
    """
    summaries = {name: SplitSummary() for name in SPLITS}
    paired = np.unique(np.concatenate([found.row, found.near]))
    excerpts = [pa.RecordBatch.from_pylist([], EXCERPT)]
    train, validation, test = (parquet.PartWriter(b.out / name, ROWS) for name in SPLITS)
    done = 0
    with train, validation, test, parquet.FileWriter(b.out / "rejects.parquet", REJECTS) as rejects:
        for batch in parquet.read_batches(parts):
            here = slice(done, done + batch.num_rows)
            for i, (name, writer) in enumerate(zip(SPLITS, (train, validation, test))):
                rows = batch.filter(pa.array((split[here] == i) & ~dropped[here]))
                summaries[name].add(rows)
                writer.write(rows)
            if dropped[here].any():
                rejects.append([_reject(row) for row in batch.filter(pa.array(dropped[here])).to_pylist()])
            first, last = np.searchsorted(paired, (here.start, here.stop))
            if first < last:
                excerpts.append(_excerpt(batch, paired[first:last] - done, split[here]))
            done = here.stop
            b.report.progress("write", done, len(split), "rows")
    pairs_path = b.out / "near_duplicates.parquet"
    return summaries, _write_pairs(pairs_path, pa.Table.from_batches(excerpts), paired, found)


def _reject(row: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps({k: row[k] for k in ("group", "messages", "tools")}, ensure_ascii=False, sort_keys=True)
    return {
        **{k: row[k] for k in ("row_id", "source", "file", "line")},
        "reasons": [str(RejectReason.NEAR_DUPLICATE_OF_HELD_OUT)],
        "raw": raw,
    }


def _excerpt(batch: pa.RecordBatch, at: np.ndarray, split: np.ndarray) -> pa.RecordBatch:
    """Some rows of a batch, as the list of pairs has them."""
    taken = batch.select(["row_id", "group", "messages"]).take(pa.array(at))
    texts = pc.utf8_slice_codeunits(texts_of(taken.column("messages")), 0, EXCERPT_CHARACTERS)
    names = pa.array(SPLITS).take(pa.array(split[at]))
    return pa.RecordBatch.from_arrays(
        [taken.column("row_id"), taken.column("group"), names, texts], schema=EXCERPT
    )


def _write_pairs(
    path: Path, excerpts: pa.Table, paired: np.ndarray, found: CrossSplitDuplicates
) -> list[dict[str, Any]]:
    """Writes all pairs, some thousands at a time, and returns the most similar ones with shortened texts.

    Args:
        excerpts: The rows `paired` (ascending), which are all that occur in a pair.
    """

    def pairs(at: np.ndarray) -> pa.Table:
        columns = {"similarity": pa.array(found.similarity[at])}
        for of, rows in (("", found.row), ("of_", found.near)):
            taken = excerpts.take(pa.array(np.searchsorted(paired, rows[at])))
            columns |= {f"{of}{name}": taken[name] for name in EXCERPT.names}
        return pa.table(columns, schema=PAIRS)

    with parquet.FileWriter(path, PAIRS) as out:
        for first in range(0, len(found.row), parquet.ROW_GROUP):
            out.write(pairs(np.arange(first, min(first + parquet.ROW_GROUP, len(found.row)))))
    worst = pairs(np.lexsort((found.row, -found.similarity))[:WORST_PAIRS]).to_pylist()
    return [
        {k: v[:WORST_CHARACTERS] if k.endswith("text") else v for k, v in pair.items()}
        | {"similarity": round(pair["similarity"], 3)}
        for pair in worst
    ]


def _summary(config: SplitConfig, outcome: SplitOutcome) -> dict[str, Any]:
    """What split.json holds."""
    near = None
    if config.near_duplicates is not None:
        near = {
            **config.near_duplicates.model_dump(mode="json"),
            "found": outcome.near_duplicates,
            "dropped": outcome.rejects,
            "left": {name: hits for name, (hits, _) in (outcome.leaks or {}).items()},
            "leakage": outcome.leakage,
        }
    labels = {
        name: dict(sorted(s.labels.items())) for name, s in outcome.written.items() if s.labels is not None
    }
    return {
        "salt": config.salt,
        "fractions": {"validation": config.validation, "test": config.test},
        "fixed_groups": config.groups.model_dump(mode="json"),
        "time_cutoff": config.time_cutoff,
        "counts": outcome.counts,
        "sides": {name: s.to_json(len(outcome.on_disk[name].groups)) for name, s in outcome.written.items()},
        "labels": labels if len(labels) == len(SPLITS) else None,
        "group_overlap": len(outcome.shared_groups),
        "near_duplicates": near,
    }

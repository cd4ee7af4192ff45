"""Writes the three sides, the rejects and the list of near-duplicate pairs, in one pass over the rows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.grouped_split.leakage import Straddling
from sft_pipeline.stages.grouped_split.shingles import texts_of
from sft_pipeline.stages.grouped_split.split import SIDES
from sft_pipeline.stages.grouped_split.summary import SideSummary
from sft_pipeline.stages.stage import Build
from sft_pipeline.tables import parquet
from sft_pipeline.tables.schemas import REJECTS, ROWS

NEAR_DUPLICATE = "near_duplicate_of_held_out"
EXCERPT = pa.schema([(name, pa.string()) for name in ("row_id", "group", "side", "text")])
PAIRS = pa.schema(
    [("similarity", pa.float64()), *((f"{of}{f.name}", f.type) for of in ("", "of_") for f in EXCERPT)]
)
SHOWN_TEXT = 500
WORST_PAIRS, WORST_TEXT = 10, 200


def write_sides(
    b: Build, parts: list[Path], side: np.ndarray, dropped: np.ndarray, found: Straddling
) -> tuple[dict[str, SideSummary], list[dict[str, Any]]]:
    """Writes train/, validation/, test/, rejects.parquet and near_duplicates.parquet, in the order of the rows.

    Args:
        side: Per row the side of its group, an index into SIDES (int8).
        dropped: Which rows become rejects (bool).

    Returns:
        (what was handed to each side's writer, the most similar pairs).
    """
    handed = {name: SideSummary() for name in SIDES}
    shown = np.unique(np.concatenate([found.row, found.near]))
    excerpts = [pa.RecordBatch.from_pylist([], EXCERPT)]
    train, validation, test = (parquet.PartWriter(b.out / name, ROWS) for name in SIDES)
    done = 0
    with train, validation, test, parquet.FileWriter(b.out / "rejects.parquet", REJECTS) as rejects:
        for batch in parquet.read_batches(parts):
            here = slice(done, done + batch.num_rows)
            for i, (name, writer) in enumerate(zip(SIDES, (train, validation, test))):
                rows = batch.filter(pa.array((side[here] == i) & ~dropped[here]))
                handed[name].add(rows)
                writer.write(rows)
            if dropped[here].any():
                rejects.append([_reject(row) for row in batch.filter(pa.array(dropped[here])).to_pylist()])
            first, last = np.searchsorted(shown, (here.start, here.stop))
            if first < last:
                excerpts.append(_excerpt(batch, shown[first:last] - done, side[here]))
            done = here.stop
            b.report.progress("write", done, len(side), "rows")
    return handed, _write_pairs(
        b.out / "near_duplicates.parquet", pa.Table.from_batches(excerpts), shown, found
    )


def _reject(row: dict[str, Any]) -> dict[str, Any]:
    raw = json.dumps({k: row[k] for k in ("group", "messages", "tools")}, ensure_ascii=False, sort_keys=True)
    return {
        **{k: row[k] for k in ("row_id", "source", "file", "line")},
        "reasons": [NEAR_DUPLICATE],
        "raw": raw,
    }


def _excerpt(batch: pa.RecordBatch, at: np.ndarray, side: np.ndarray) -> pa.RecordBatch:
    """Some rows of a batch, as the list of pairs shows them."""
    taken = batch.select(["row_id", "group", "messages"]).take(pa.array(at))
    texts = pc.utf8_slice_codeunits(texts_of(taken.column("messages")), 0, SHOWN_TEXT)
    names = pa.array(SIDES).take(pa.array(side[at]))
    return pa.RecordBatch.from_arrays(
        [taken.column("row_id"), taken.column("group"), names, texts], schema=EXCERPT
    )


def _write_pairs(
    path: Path, excerpts: pa.Table, shown: np.ndarray, found: Straddling
) -> list[dict[str, Any]]:
    """Writes all pairs, some thousands at a time, and gives the most similar ones, side by side.

    Args:
        excerpts: The rows `shown` (ascending), which are all that occur in a pair.
    """

    def pairs(at: np.ndarray) -> pa.Table:
        columns = {"similarity": pa.array(found.similarity[at])}
        for of, rows in (("", found.row), ("of_", found.near)):
            taken = excerpts.take(pa.array(np.searchsorted(shown, rows[at])))
            columns |= {f"{of}{name}": taken[name] for name in EXCERPT.names}
        return pa.table(columns, schema=PAIRS)

    with parquet.FileWriter(path, PAIRS) as out:
        for first in range(0, len(found.row), parquet.ROW_GROUP):
            out.write(pairs(np.arange(first, min(first + parquet.ROW_GROUP, len(found.row)))))
    worst = pairs(np.lexsort((found.row, -found.similarity))[:WORST_PAIRS]).to_pylist()
    return [
        {k: v[:WORST_TEXT] if k.endswith("text") else v for k, v in pair.items()}
        | {"similarity": round(pair["similarity"], 3)}
        for pair in worst
    ]

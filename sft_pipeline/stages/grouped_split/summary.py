"""What is on each side: gathered while its rows are written, and read back from its files to compare."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.grouped_split.shingles import is_system
from sft_pipeline.tables import parquet

MAX_LABELS = 100
_MERGE_GROUPS = 64  # batches after which their distinct groups are joined


@dataclass
class SideSummary:
    """One side, as its rows were handed to the writer.

    Attributes:
        characters: Per batch the characters of each row: everything said, the system message left out (int64).
        labels: How often each completion occurs; None where there are more than MAX_LABELS of them (no labels, then).
    """

    rows: int = 0
    turns: int = 0
    sources: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] | None = field(default_factory=Counter)
    characters: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    _ids: "RowIds" = field(default_factory=lambda: RowIds())

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts rows in (columns row_id, source and messages)."""
        if not batch.num_rows:
            return
        messages = batch.column("messages")
        flat = messages.flatten()
        ends = messages.offsets.to_numpy() - messages.offsets[0].as_py()
        self.rows += batch.num_rows
        self.turns += pc.sum(pc.equal(flat.field("role"), "assistant")).as_py() or 0
        self.sources.update(_counts(batch.column("source")))
        if self.labels is not None:
            self.labels.update(_counts(flat.field("content").take(pa.array(ends[1:] - 1)), MAX_LABELS + 1))
            if len(self.labels) > MAX_LABELS:
                self.labels = None
        said = np.concatenate([[0], np.cumsum(_characters(flat))])
        self.characters.append(said[ends[1:]] - said[ends[:-1]])
        self._ids.add(batch.column("row_id"))

    @property
    def row_ids(self) -> str:
        """A digest over the row ids in order."""
        return self._ids.digest

    @property
    def lengths(self) -> np.ndarray:
        """Characters per row (int64 [rows])."""
        return np.concatenate(self.characters)

    def to_json(self, groups: int) -> dict[str, Any]:
        lengths = self.lengths
        return {
            "rows": self.rows,
            "groups": groups,
            "turns": self.turns,
            "characters": {
                "mean": round(float(lengths.mean()), 1),
                "median": int(np.median(lengths)),
                "p95": int(np.percentile(lengths, 95)),
                "max": int(lengths.max()),
            }
            if self.rows
            else None,
            "rows_by_source": {str(k): v for k, v in sorted(self.sources.items())},
        }


@dataclass(frozen=True)
class OnDisk:
    """One side, as its files hold it.

    Attributes:
        groups: Its distinct groups.
        row_ids: A digest over the row ids in order.
    """

    rows: int
    groups: pa.Array
    row_ids: str


def on_disk(paths: Iterable[Path]) -> OnDisk:
    """Reads one side's files back, a batch at a time."""
    groups, ids, rows = [pa.array([], pa.string())], RowIds(), 0
    for batch in parquet.read_batches(paths, ["row_id", "group"], parquet.ROW_GROUP):
        rows += batch.num_rows
        ids.add(batch.column("row_id"))
        groups.append(pc.unique(batch.column("group")))
        if len(groups) > _MERGE_GROUPS:
            groups = [pc.unique(pa.concat_arrays(groups))]
    return OnDisk(rows, pc.unique(pa.concat_arrays(groups)), ids.digest)


class RowIds:
    """A digest over row ids in order, however they are cut into batches."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, row_ids: pa.StringArray) -> None:
        self._hash.update("".join(f"{i}\n" for i in row_ids.to_pylist()).encode())

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def _counts(values: pa.Array, limit: int | None = None) -> dict[Any, int]:
    """How often each of the first `limit` distinct values occurs."""
    return {c["values"]: c["counts"] for c in pc.value_counts(values)[:limit].to_pylist()}


def _characters(messages: pa.StructArray) -> np.ndarray:
    """Characters of each message (int64); the system's count as none."""
    content, calls = (
        pc.fill_null(pc.utf8_length(messages.field(name)), 0).to_numpy(zero_copy_only=False)
        for name in ("content", "tool_calls")
    )
    return np.where(is_system(messages).to_numpy(zero_copy_only=False), 0, content.astype(np.int64) + calls)

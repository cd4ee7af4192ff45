"""What is on each side, read back from the written files: rows, groups, lengths, sources, labels."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages import tables
from sft_pipeline.stages.grouped_split.shingles import texts_of

MAX_LABELS = 100


@dataclass
class SideSummary:
    """One side.

    Attributes:
        groups: Its distinct groups.
        characters: Per row, of everything said (the system message left out).
        labels: How often each completion occurs; None where there are more than MAX_LABELS of them (no labels, then).
    """

    rows: int = 0
    groups: pa.Array = field(default_factory=lambda: pa.array([], pa.string()))
    characters: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sources: Counter[int] = field(default_factory=Counter)
    turns: int = 0
    labels: Counter[str] | None = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        lengths = self.characters
        return {
            "rows": self.rows,
            "groups": len(self.groups),
            "turns": self.turns,
            "characters": {
                "mean": round(float(lengths.mean()), 1), "median": int(np.median(lengths)), "p95": int(np.percentile(lengths, 95)), "max": int(lengths.max()),
            } if self.rows else None,
            "rows_by_source": {str(k): v for k, v in sorted(self.sources.items())},
        }  # fmt: skip


def summarize(paths: list[Path]) -> SideSummary:
    """Reads one side's files, a batch at a time."""
    side = SideSummary()
    groups, characters = [side.groups], [side.characters]
    for batch in tables.read_batches(paths, ["source", "group", "messages"]):
        messages = batch.column("messages")
        side.rows += batch.num_rows
        groups.append(pc.unique(batch.column("group")))
        characters.append(pc.utf8_length(texts_of(messages)).to_numpy(zero_copy_only=False).astype(np.int64))
        side.sources.update(batch.column("source").to_pylist())
        side.turns += int(pc.sum(pc.equal(messages.flatten().field("role"), "assistant")).as_py() or 0)
        if side.labels is not None and batch.num_rows:
            ends = messages.offsets.to_numpy(zero_copy_only=False)[1:] - 1
            counts = pc.value_counts(messages.values.field("content").take(pa.array(ends))).to_pylist()
            side.labels.update({c["values"]: c["counts"] for c in counts[: MAX_LABELS + 1]})
            if len(side.labels) > MAX_LABELS:
                side.labels = None
        if len(groups) > 64:
            groups = [pc.unique(pa.concat_arrays(groups))]
    side.groups = pc.unique(pa.concat_arrays(groups))
    side.characters = np.concatenate(characters)
    return side

"""The rows that two models were trained on, compared: added, removed, changed.

A row is known by its row_id, the hash of its content, so a row that was edited has another one. Of the rows
that only one side has, two are one changed row if they are of the same group (in the order of the file), or
else lie at the same place of the source: where the data has no groups, each row is its own.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from sft_pipeline.store import Artifact

SPLITS = ("train", "validation", "test")
REJECT_FILES = ("rejects.parquet", "quarantine.parquet")


@dataclass(frozen=True)
class SourceRow:
    """One row of the training side and where it was written: `line` counts from 1."""

    row_id: str
    source: int
    file: str
    line: int
    group: str

    def to_json(self, **more: Any) -> dict[str, Any]:
        return {"row_id": self.row_id, "file": self.file, "line": self.line, "group": self.group, **more}


@dataclass(frozen=True)
class RowChanges:
    """The outcome.

    Attributes:
        same: Rows that both were trained on.
        added, removed: Rows that only the second, or only the first was trained on, with `before`, `now`:
            where the other has that row instead (null: nowhere).
        changed: {before, after, same: what both have in common}.
    """

    same: int
    added: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    changed: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def compare_rows(a: Mapping[str, Artifact], b: Mapping[str, Artifact]) -> RowChanges:
    """Compares the rows of the training side that reached the model, that is after all rejections.

    Args:
        a, b: The artifacts behind a model by stage: tokenized_rows, grouped_split, and validated_rows where
            it is at hand.
    """
    ids = [Counter(_ids(side["tokenized_rows"], "train")) for side in (a, b)]
    same = sum((ids[0] & ids[1]).values())
    removed = _placed(ids[0] - ids[1], a)
    added = _placed(ids[1] - ids[0], b)
    changed = list(_pairs(removed, added))
    gone, new = ({row for pair in changed for row in pair[n : n + 1]} for n in (0, 1))
    left, came = [r for r in removed if r not in gone], [r for r in added if r not in new]
    now, before = _whereabouts({r.row_id for r in left}, b), _whereabouts({r.row_id for r in came}, a)
    return RowChanges(
        same,
        [row.to_json(before=before.get(row.row_id)) for row in came],
        [row.to_json(now=now.get(row.row_id)) for row in left],
        [{"before": old.to_json(), "after": row.to_json(), "same": common} for old, row, common in changed],
    )


def _ids(tokenized: Artifact, split: str) -> Iterator[str]:
    """The rows of a split; the parts of a row that was split over several are one."""
    for path in tokenized.parts(split):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=["row_id"]):
                yield from (i for i in batch.column(0).to_pylist() if "/" not in i)


def _placed(wanted: Counter[str], side: Mapping[str, Artifact]) -> list[SourceRow]:
    """Rows with their places, in the order of the source."""
    found: list[SourceRow] = []
    left = Counter(wanted)
    columns = ["row_id", "source", "file", "line", "group"]
    for path in side["grouped_split"].parts("train") if wanted else ():
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    if left[row["row_id"]] > 0:
                        left[row["row_id"]] -= 1
                        found.append(SourceRow(**row))
    return sorted(found, key=lambda row: (row.source, row.file, row.line, row.row_id))


def _pairs(removed: list[SourceRow], added: list[SourceRow]) -> Iterator[tuple[SourceRow, SourceRow, str]]:
    """(before, after, what they have in common)."""
    groups: dict[str, tuple[list[SourceRow], list[SourceRow]]] = defaultdict(lambda: ([], []))
    for number, rows in enumerate((removed, added)):
        for row in rows:
            groups[row.group][number].append(row)
    paired: set[SourceRow] = set()
    for olds, news in groups.values():
        # Those at the same line first: a row that was taken out of a group changes none of the others.
        lines = {(row.source, row.file, row.line): row for row in news}
        at_line = [(o, lines[o.source, o.file, o.line]) for o in olds if (o.source, o.file, o.line) in lines]
        rest = [o for o in olds if o not in {p[0] for p in at_line}]
        others = [n for n in news if n not in {p[1] for p in at_line}]
        for old, new in (*at_line, *zip(rest, others)):
            paired |= {old, new}
            yield old, new, "group"
    places = {(r.source, r.file, r.line): r for r in added if r not in paired}
    for old in removed:
        at_place = places.get((old.source, old.file, old.line))
        if old not in paired and at_place is not None:
            yield old, at_place, "line"


def _whereabouts(row_ids: set[str], side: Mapping[str, Artifact]) -> dict[str, str]:
    """{row_id: the other split that has it, or why it was rejected}."""
    found: dict[str, str] = {}
    if not row_ids:
        return found
    for split in SPLITS[1:]:
        for row_id in _ids(side["tokenized_rows"], split):
            if row_id in row_ids:
                found[row_id] = split
    for stage in ("tokenized_rows", "grouped_split", "validated_rows"):
        for name in REJECT_FILES if stage in side else ():
            path = side[stage].file(name)
            if path.is_file():
                for row in pq.read_table(path, columns=["row_id", "reasons"]).to_pylist():
                    if row["row_id"] in row_ids and row["row_id"] not in found:
                        found[row["row_id"]] = f"rejected: {', '.join(row['reasons'])}"
    return found

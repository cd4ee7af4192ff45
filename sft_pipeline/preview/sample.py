"""The first rows of a dataset's sources, as validated_rows would have them.

The rows are read and validated by the functions that build raw_rows and validated_rows, in a folder that is
removed afterwards. What depends on all rows, such as exact duplicates further down, does not show.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.raw_rows.decode import Reject, Rows
from sft_pipeline.stages.raw_rows.find import find_files
from sft_pipeline.stages.raw_rows.locate import is_hub
from sft_pipeline.stages.raw_rows.readers import read_file
from sft_pipeline.stages.raw_rows.streams import SourceFile
from sft_pipeline.stages.raw_rows.table_files import read_hub
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.validated_rows.absent_columns import absent_columns
from sft_pipeline.stages.validated_rows.assemble import Assembler, assembled_shape
from sft_pipeline.stages.validated_rows.asset import STAGE as VALIDATED_ROWS
from sft_pipeline.stages.validated_rows.build import group_columns, resolved_shapes
from sft_pipeline.stages.validated_rows.config import ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.statistics import DigestSet
from sft_pipeline.stages.validated_rows.validate import RowValidator
from sft_pipeline.store import Artifact
from sft_pipeline.tables import parquet
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import RAW_ROWS

ROWS = 1_000  # of each source
JOINED_ROWS = 100_000  # of a second file; partners further down are not found


@dataclass
class Sample:
    """What came of the first rows.

    Attributes:
        rows: Accepted ones: row_id, source, file, line, group, messages, tools.
        rejected: row_id, source, file, line, reasons, details, raw.
        formats: Of each source.
        groups: The column with the group key of each source, None where each row is its own.
        unused: Rows (or messages) by the key that nothing reads.
        arranged: Turns by the key of the contract that merged or left them out.
        absent: Columns that the dataset file names and that none of these rows has.
        read: Rows that were read.
        whole: Whether these are all rows of the dataset.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    arranged: Counter[str] = field(default_factory=Counter)
    absent: list[str] = field(default_factory=list)
    read: int = 0
    whole: bool = True

    @property
    def not_selected(self) -> int:
        return sum(r["reasons"] == [RejectReason.NOT_SELECTED] for r in self.rejected)

    @property
    def reject_rate(self) -> float:
        judged = len(self.rows) + len(self.rejected) - self.not_selected
        return (judged - len(self.rows)) / max(1, judged)


def sample_dataset(dataset: DatasetConfig, snapshot: str, rows: int = ROWS) -> Sample:
    """Reads and validates the first rows of each source.

    Args:
        rows: How many of each source.

    Raises:
        InputError: A file cannot be read, `format: auto` finds no format, a transform cannot be imported.
    """
    found = Sample()
    with tempfile.TemporaryDirectory(prefix="sft-preview-") as folder:
        raw = Artifact(Path(folder) / "raw_rows")
        taken: list[dict[str, Any]] = []
        for number, source in enumerate(dataset.sources):
            one_row = {column.partition(".")[0] for column in source.columns.values()}
            first = _rows(_read(source, snapshot, one_row), number, rows + 1, found)
            taken += islice(first, rows)
            found.whole &= next(first, None) is None
            if source.join:
                theirs = _rows(_read(source, snapshot, set(), joined=True), number, JOINED_ROWS, found)
                _write(raw.path / "joined" / str(number), list(theirs))
        found.read = len(taken)
        _write(raw.path / "rows", taken)
        config = VALIDATED_ROWS.config(Branch(dataset, snapshot))
        assert isinstance(config, ValidatedRowsConfig)
        _validate(raw, config, Path(folder) / "work", found)
    return found


def first_rows(source: RawSource, snapshot: str, count: int = ROWS) -> tuple[list[dict[str, Any]], bool]:
    """(the first rows of a source as they are written, whether these are all)."""
    rows: list[dict[str, Any]] = []
    for one in _read(source, snapshot, set()):
        if isinstance(one[1], Rows):
            rows += map(json.loads, one[1].contents)
        if len(rows) > count:
            return rows[:count], False
    return rows, True


def _read(
    source: RawSource, snapshot: str, one_row: set[str], joined: bool = False
) -> Iterator[tuple[str, Rows | Reject]]:
    if is_hub(source.path):
        for one in read_hub(source.path, Counter()):
            yield source.path, one
        return
    found = find_files(source, snapshot)
    files: Sequence[SourceFile] = found.joined if joined else found.files
    for file in files:
        for one in read_file(file, row_fields=() if joined else one_row):
            yield file.name, one


def _rows(
    read: Iterator[tuple[str, Rows | Reject]], source: int, most: int, found: Sample
) -> Iterator[dict[str, Any]]:
    """At most so many rows, with the columns of raw_rows; what cannot be decoded goes to `found`."""
    for name, one in read:
        if isinstance(one, Reject):
            place = {"row_id": one.row_id, "source": source, "file": name, "line": one.line}
            rejected = {**place, "reasons": [str(one.reason)], "details": [""], "raw": one.raw}
            found.rejected.append(rejected)
            continue
        for line, row_id, content in zip(*one):
            place = {"row_id": row_id, "source": source, "file": name, "line": line}
            yield {**place, "content": content.decode()}
            most -= 1
            if not most:
                return


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    with parquet.PartWriter(folder, RAW_ROWS) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, schema=RAW_ROWS))


def _validate(raw: Artifact, config: ValidatedRowsConfig, work: Path, found: Sample) -> None:
    """Adds what validated_rows would make of the raw rows."""
    shapes = resolved_shapes(config.shapes, raw)
    found.absent = absent_columns(raw, shapes)
    assembled = [assembled_shape(shape) for shape in shapes]
    found.formats, found.groups = [s.format for s in shapes], group_columns(raw.parts("rows"), assembled)

    def rejected(row: dict[str, Any], reason: RejectReason, detail: str) -> None:
        place = {name: row[name] for name in ("row_id", "source", "file", "line")}
        found.rejected.append({**place, "reasons": [str(reason)], "details": [detail], "raw": row["content"]})

    assembler = Assembler(raw, shapes, work, rejected)
    validator = RowValidator(config.model_copy(update={"shapes": assembled}), found.groups)
    seen = DigestSet()
    for batch in assembler.batches():
        validated, places = validator(batch), batch.to_pylist()
        new = seen.add(validated.keys)
        for i, row in enumerate(validated.rows.to_pylist()):
            place = {k: v for k, v in places[validated.kept[i]].items() if k != "content"}
            place["row_id"] = validated.ids[i]
            if new[i]:
                found.rows.append({**place, **{k: row[k] for k in ("group", "messages", "tools")}})
            else:
                raw_row = places[validated.kept[i]]
                rejected({**raw_row, "row_id": validated.ids[i]}, RejectReason.EXACT_DUPLICATE, "")
        for i, position in enumerate(validated.rejected):
            place = {k: v for k, v in places[position].items() if k != "content"}
            found.rejected.append(
                {
                    **place,
                    "row_id": validated.rejected_ids[i],
                    "reasons": validated.reasons[i],
                    "details": validated.details[i],
                    "raw": places[position]["content"],
                }
            )
        found.unused += validated.unused
        found.arranged += validated.arranged
    found.unused += assembler.unused

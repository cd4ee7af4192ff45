"""Builds validated_rows: raw rows as conversations that keep the contract, all others in quarantine."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.stage import Build, Built, Check, Evidence, number, table
from sft_pipeline.stages.validated_rows.absent_columns import absent_columns
from sft_pipeline.stages.validated_rows.assemble import Assembler, Rejected, assembled_shape
from sft_pipeline.stages.validated_rows.config import SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.detect import detect_format
from sft_pipeline.stages.validated_rows.report import evidence, reason_table, write_report
from sft_pipeline.stages.validated_rows.reshape import CannotReshape, Reshaper
from sft_pipeline.stages.validated_rows.statistics import DigestSet, RowStatistics
from sft_pipeline.stages.validated_rows.validate import RowValidator, ValidatedBatch
from sft_pipeline.stages.workers import ordered_map
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json
from sft_pipeline.tables import literal_json, parquet
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import MADE, REJECTS, ROWS, SHAPES_FILE
from sft_pipeline.tables.strict_json import read_canonical

GROUP_COLUMNS = ("group", "group_id", "thread_id", "conversation_id")
PROVENANCE = ("row_id", "source", "file", "line")
LOOKED_AT = 1_000  # rows of a source, to see their format


def build(b: Build) -> Built:
    """Validates every raw row; writes rows/, quarantine.parquet, quarantine.md and shapes.json.

    Raises:
        InputError: A transform cannot be imported, or `format: auto` finds no format.
    """
    config: ValidatedRowsConfig = b.config
    raw = b.inputs["raw_rows"]
    raw_rejects = [raw.file("rejects.parquet")]
    undecodable, decoded = parquet.count_rows(raw_rejects), parquet.count_rows(raw.parts("rows"))
    shapes = resolved_shapes(config.shapes, raw)
    write_json(b.out / SHAPES_FILE, [shape.model_dump(mode="json") for shape in shapes])
    assembled = [assembled_shape(shape) for shape in shapes]
    quarantine_path = b.out / "quarantine.parquet"
    groups = group_columns(raw.parts("rows"), assembled)
    statistics, seen = RowStatistics(), DigestSet()
    shutil.rmtree(b.work, ignore_errors=True)
    with (
        parquet.PartWriter(b.out / "rows", ROWS) as rows,
        parquet.FileWriter(quarantine_path, REJECTS) as quarantine,
    ):
        for batch in parquet.read_batches(raw_rejects):
            quarantine.write(batch)
        made = _MadeWriter(b.out / "made", any(s.transform or s.format == "turns" for s in shapes))
        assembler = Assembler(raw, shapes, b.work, _writer_of(quarantine), made.add)
        arguments = (config.model_copy(update={"shapes": assembled}), groups)
        with closing(  # an error here ends the workers at once
            ordered_map(RowValidator, arguments, assembler.batches())
        ) as validated_batches:
            for batch, validated in validated_batches:
                new = seen.add(validated.keys)
                accepted = accepted_rows(batch, validated, new)
                rows.write(accepted)
                statistics.add(accepted, validated.groups[new])
                statistics.unused += validated.unused
                statistics.arranged += validated.arranged
                assembler.counts["added"] += validated.added
                made.add_batch(batch, validated)
                quarantine.write(rejected_rows(batch, validated, new))
                b.report.progress("validate", rows.rows + quarantine.rows - undecodable, decoded, "rows")
    made.close()
    shutil.rmtree(b.work, ignore_errors=True)
    statistics.unused += assembler.unused
    reasons = parquet.count_reasons([quarantine_path])
    counts = {
        "read": undecodable + decoded,
        "accepted": parquet.count_rows(sorted((b.out / "rows").glob("*.parquet"))),
        "quarantined": parquet.count_rows([quarantine_path]),
        "undecodable": undecodable,
        "warned": statistics.warned,
        "groups": statistics.groups,
    }
    # What only some datasets ask for.
    more = assembler.counts | Counter(
        not_selected=reasons.get(str(RejectReason.NOT_SELECTED), 0),
        turns_arranged=statistics.arranged.total(),
    )
    counts |= {name: count for name, count in more.items() if count}
    write_report(b.out / "quarantine.md", quarantine_path, counts["read"], statistics.warnings)
    return Built(
        counts=counts,
        checks=_checks(config, counts, quarantine_path, absent_columns(raw, shapes)),
        volatile=("plots/", "quarantine.md"),
        evidence=evidence(b.out, counts, statistics, shapes),
    )


def resolved_shapes(shapes: Sequence[SourceShape], raw: Artifact) -> list[SourceShape]:
    """The shapes, with the format that `auto` stands for.

    Raises:
        InputError: The rows of a source have no known format, or several.
    """
    found = []
    for source, shape in enumerate(shapes):
        if shape.format == "auto":
            rows = islice(_first_rows(raw, source, shape), LOOKED_AT)
            format_ = detect_format(rows, shape.columns, f"sources[{source}]")
            shape = shape.model_copy(update={"format": format_})
        found.append(shape)
    return found


def _first_rows(raw: Artifact, source: int, shape: SourceShape) -> Iterator[dict[str, Any]]:
    """The rows of a source as they are before their format is read, without what a join adds."""
    reshaper = Reshaper(shape, f"sources[{source}]")
    for batch in parquet.read_batches(raw.parts("rows")):
        chosen = batch.filter(pc.equal(batch.column("source"), source))
        for row_id, content in zip(*(chosen.column(n).to_pylist() for n in ("row_id", "content"))):
            with contextlib.suppress(CannotReshape):
                yield from (row for _, row in reshaper(row_id, literal_json.loads(content)))


def _writer_of(quarantine: parquet.FileWriter) -> Rejected:
    def rejected(row: dict[str, Any], reason: RejectReason, detail: str) -> None:
        place = {name: row[name] for name in PROVENANCE}
        quarantine.append([{**place, "reasons": [str(reason)], "details": [detail], "raw": row["content"]}])

    return rejected


class _MadeWriter:
    """Writes made/: which rows have which rows of raw_rows in them, where their ids differ."""

    def __init__(self, folder: Path, needed: bool) -> None:
        self._writer = parquet.PartWriter(folder, MADE) if needed else None
        self._waiting: list[dict[str, str]] = []

    def add(self, row_id: str, made_of: list[str]) -> None:
        self._waiting += [{"row_id": row_id, "made_of": each} for each in made_of]
        if len(self._waiting) > LOOKED_AT:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch, validated: ValidatedBatch) -> None:
        if self._writer:
            positions = [*validated.kept.tolist(), *validated.rejected.tolist()]
            own = batch.column("row_id").to_pylist()
            for position, row_id in zip(positions, [*validated.ids, *validated.rejected_ids]):
                if row_id != own[position]:
                    self.add(row_id, [own[position]])

    def _flush(self) -> None:
        assert self._writer is not None
        self._writer.write(pa.RecordBatch.from_pylist(self._waiting, schema=MADE))
        self._waiting = []

    def close(self) -> None:
        if self._writer:
            self._flush()
            self._writer.close()


def accepted_rows(batch: pa.RecordBatch, validated: ValidatedBatch, new: np.ndarray) -> pa.RecordBatch:
    """The rows of the batch that keep the contract and are new, as validated rows.

    Args:
        new: For each row in `validated.rows`, whether no earlier row is the same.
    """
    places = batch.select(PROVENANCE[1:]).take(pa.array(validated.kept))
    ids = pa.array(validated.ids, pa.string())
    rows = pa.RecordBatch.from_arrays([ids, *places.columns, *validated.rows.columns], schema=ROWS)
    return rows if new.all() else rows.filter(pa.array(new))


def rejected_rows(batch: pa.RecordBatch, validated: ValidatedBatch, new: np.ndarray) -> pa.RecordBatch:
    """All other rows of the batch in their order, with their reasons."""
    duplicates = np.flatnonzero(~new).tolist()
    ids = [*validated.rejected_ids, *(validated.ids[i] for i in duplicates)]
    reasons = [*validated.reasons, *([str(RejectReason.EXACT_DUPLICATE)] for _ in duplicates)]
    details = [*validated.details, *([""] for _ in duplicates)]
    positions = np.concatenate((validated.rejected, validated.kept[~new]))
    order = np.argsort(positions, kind="stable")
    found = batch.take(pa.array(positions[order]))
    arrays = [
        pa.array([ids[i] for i in order], pa.string()),
        *(found.column(name) for name in PROVENANCE[1:]),
        pa.array([reasons[i] for i in order], REJECTS.field("reasons").type),
        found.column("content"),
        pa.array([details[i] for i in order], REJECTS.field("details").type),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=REJECTS)


def group_columns(paths: list[Path], shapes: Sequence[SourceShape]) -> list[str | None]:
    """The column with the group key for each source.

    The mapped one, else a well-known one that its rows carry, else None: then each row is its own group.
    """
    found: list[str | None] = [shape.columns.get("group") for shape in shapes]
    unknown = {i for i, column in enumerate(found) if column is None}
    if not unknown:
        return found
    # A search in the text finds the few rows worth parsing: those with such a key, or with escaped letters.
    key = rf'"(?:{"|".join(GROUP_COLUMNS)})"\s*:|\\u00[567]'
    for batch in parquet.read_batches(paths, ["source", "content"]):
        if not unknown:
            break
        hits = batch.filter(pc.match_substring_regex(batch.column("content"), key))
        sources = hits.column("source").to_pylist()
        rows = read_canonical(hits.column("content").cast(pa.binary()).to_pylist())
        for name in GROUP_COLUMNS:
            for source, row in zip(sources, rows):
                if source in unknown and row.get(name) not in (None, ""):
                    found[source] = name
                    unknown.discard(source)
    return found


def _checks(
    config: ValidatedRowsConfig, counts: dict[str, int], quarantine: Path, absent: Sequence[str]
) -> tuple[Check, ...]:
    read, accepted, left_out = counts["read"], counts["accepted"], counts.get("not_selected", 0)
    merged, added = counts.get("merged", 0), counts.get("added", 0)
    rejected, made = counts["quarantined"] - left_out, read - merged + added
    judged = made - left_out
    rate, bound = rejected / max(1, judged), config.contract.max_reject_rate
    reasons = [e for e in reason_table(quarantine) if e["reason"] != RejectReason.NOT_SELECTED]
    named = ", ".join(f"{e['reason']} {e['rows']:,}" for e in reasons[:4])
    evidence: dict[str, Evidence] = {"reject_rate": number(rate), "bound": number(bound)}
    if reasons:
        evidence |= {
            "reasons": table(list(reasons)),
            "first": table(list(parquet.first_offenders(quarantine))),
        }
    return (
        Check(
            "reject_rate",
            rate <= bound,
            f"{rejected:,} of {judged:,} rows ({rate:.2%}) were rejected, at most {bound:.2%} may be"
            + (f": {named}" if named else ""),
            evidence,
        ),
        Check(
            "counts_add_up",
            accepted + counts["quarantined"] == made,
            f"{accepted:,} accepted + {counts['quarantined']:,} quarantined = {made:,} of {read:,} read"
            + (f", {merged:,} of which are turns of a row before them" if merged else "")
            + (f", and {added:,} that a transform made" if added else ""),
            {name: number(counts[name]) for name in ("read", "accepted", "quarantined")},
        ),
        Check(
            "has_rows",
            accepted > 0,
            f"{accepted:,} rows were accepted"
            + (f"; rejected: {named}" if named and not accepted else "")
            + (f"; not selected by where or transform: {left_out:,}" if left_out and not accepted else ""),
            {"rows": number(accepted)},
        ),
        Check(
            "columns_there",
            not absent,
            f"no row has a column that the dataset file names: {', '.join(absent)}. It counts as null or "
            "absent everywhere; is it misspelt?"
            if absent
            else "every column that the dataset file names is in some row",
        ),
    )

"""Builds validated_rows: raw rows as conversations that keep the contract, all others in quarantine."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.stage import Build, Built, Check, Evidence, number, table
from sft_pipeline.stages.validated_rows.config import SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.report import evidence, reason_table, write_report
from sft_pipeline.stages.validated_rows.statistics import DigestSet, RowStatistics
from sft_pipeline.stages.validated_rows.validate import RowValidator, ValidatedBatch
from sft_pipeline.stages.workers import ordered_map
from sft_pipeline.tables import parquet
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import REJECTS, ROWS
from sft_pipeline.tables.strict_json import read_canonical

GROUP_COLUMNS = ("group", "group_id", "thread_id", "conversation_id")
PROVENANCE = ("row_id", "source", "file", "line")


def build(b: Build) -> Built:
    """Validates every raw row; writes rows/, quarantine.parquet and quarantine.md."""
    config: ValidatedRowsConfig = b.config
    raw = b.inputs["raw_rows"]
    raw_rejects = [raw.file("rejects.parquet")]
    undecodable, decoded = parquet.count_rows(raw_rejects), parquet.count_rows(raw.parts("rows"))
    quarantine_path = b.out / "quarantine.parquet"
    groups = group_columns(raw.parts("rows"), config.shapes)
    statistics, seen = RowStatistics(), DigestSet()
    with (
        parquet.PartWriter(b.out / "rows", ROWS) as rows,
        parquet.FileWriter(quarantine_path, REJECTS) as quarantine,
        closing(  # an error here ends the workers at once
            ordered_map(RowValidator, (config, groups), parquet.read_batches(raw.parts("rows")))
        ) as validated_batches,
    ):
        for batch in parquet.read_batches(raw_rejects):
            quarantine.write(batch)
        for batch, validated in validated_batches:
            new = seen.add(validated.keys)
            accepted = accepted_rows(batch, validated, new)
            rows.write(accepted)
            statistics.add(accepted, validated.groups[new])
            statistics.unused += validated.unused
            quarantine.write(rejected_rows(batch, validated, new))
            b.report.progress("validate", rows.rows + quarantine.rows - undecodable, decoded, "rows")
    counts = {
        "read": undecodable + decoded,
        "accepted": parquet.count_rows(sorted((b.out / "rows").glob("*.parquet"))),
        "quarantined": parquet.count_rows([quarantine_path]),
        "undecodable": undecodable,
        "warned": statistics.warned,
        "groups": statistics.groups,
    }
    write_report(b.out / "quarantine.md", quarantine_path, counts["read"], statistics.warnings)
    return Built(
        counts=counts,
        checks=_checks(config, counts, quarantine_path),
        volatile=("plots/", "quarantine.md"),
        evidence=evidence(b.out, counts, statistics),
    )


def accepted_rows(batch: pa.RecordBatch, validated: ValidatedBatch, new: np.ndarray) -> pa.RecordBatch:
    """The rows of the batch that keep the contract and are new, as validated rows.

    Args:
        new: For each row in `validated.rows`, whether no earlier row is the same.
    """
    places = batch.select(PROVENANCE).take(pa.array(validated.kept))
    rows = pa.RecordBatch.from_arrays([*places.columns, *validated.rows.columns], schema=ROWS)
    return rows if new.all() else rows.filter(pa.array(new))


def rejected_rows(batch: pa.RecordBatch, validated: ValidatedBatch, new: np.ndarray) -> pa.RecordBatch:
    """All other rows of the batch in their order, with their reasons."""
    duplicates = validated.kept[~new]
    reasons = [*validated.reasons, *([str(RejectReason.EXACT_DUPLICATE)] for _ in duplicates)]
    positions = np.concatenate((validated.rejected, duplicates))
    order = np.argsort(positions)
    found = batch.take(pa.array(positions[order]))
    arrays = [
        *(found.column(name) for name in PROVENANCE),
        pa.array([reasons[i] for i in order], REJECTS.field("reasons").type),
        found.column("content"),
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


def _checks(config: ValidatedRowsConfig, counts: dict[str, int], quarantine: Path) -> tuple[Check, ...]:
    read, rejected, accepted = counts["read"], counts["quarantined"], counts["accepted"]
    rate, bound = rejected / max(1, read), config.contract.max_reject_rate
    reasons = reason_table(quarantine)
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
            f"{rejected:,} of {read:,} rows ({rate:.2%}) were rejected, at most {bound:.2%} may be"
            + (f": {named}" if named else ""),
            evidence,
        ),
        Check(
            "counts_add_up",
            accepted + rejected == read,
            f"{accepted:,} accepted + {rejected:,} quarantined = {accepted + rejected:,} of {read:,} read",
            {name: number(counts[name]) for name in ("read", "accepted", "quarantined")},
        ),
        Check(
            "has_rows",
            accepted > 0,
            f"{accepted:,} rows were accepted" + (f"; rejected: {named}" if named and not accepted else ""),
            {"rows": number(accepted)},
        ),
    )

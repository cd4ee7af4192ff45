"""Builds validated_rows: raw rows as conversations that keep the contract, and everything else in quarantine."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.plots import charts
from sft_pipeline.stages.painter import Painter
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, markdown, number, plot, table
from sft_pipeline.stages.validated_rows.config import SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.judge import Judge, Judged
from sft_pipeline.stages.validated_rows.quarantine import Reason, reason_table, write_report
from sft_pipeline.stages.validated_rows.seen import Seen
from sft_pipeline.stages.validated_rows.statistics import Statistics
from sft_pipeline.stages.workers import ordered_map
from sft_pipeline.tables import parquet
from sft_pipeline.tables.schemas import REJECTS, ROWS

GROUP_COLUMNS = ("group", "group_id", "thread_id", "conversation_id")
PLACE = ("row_id", "source", "file", "line")


def build(b: Build) -> Built:
    """Validates every raw row; writes rows/, quarantine.parquet and quarantine.md."""
    with Painter() as painter:
        return _build(b, painter)


def _build(b: Build, painter: Painter) -> Built:
    config: ValidatedRowsConfig = b.config
    raw = b.inputs["raw_rows"]
    raw_rejects = [raw.file("rejects.parquet")]
    undecodable, decoded = parquet.count_rows(raw_rejects), parquet.count_rows(raw.parts("rows"))
    quarantine_path = b.out / "quarantine.parquet"
    groups = group_columns(raw.parts("rows"), config.shapes)
    statistics, seen = Statistics(), Seen()
    with (
        parquet.PartWriter(b.out / "rows", ROWS) as rows,
        parquet.FileWriter(quarantine_path, REJECTS) as quarantine,
        closing(
            ordered_map(Judge, (config, groups), parquet.read_batches(raw.parts("rows")))
        ) as judged_batches,
    ):
        for batch in parquet.read_batches(raw_rejects):
            quarantine.write(batch)
        for batch, judged in judged_batches:
            new = seen.add(judged.keys)
            accepted = accepted_rows(batch, judged, new)
            rows.write(accepted)
            statistics.add(accepted, judged.groups[new])
            quarantine.write(rejected_rows(batch, judged, new))
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
        volatile=("plots/",),
        evidence=_evidence(b.out, counts, statistics, painter),
    )


def accepted_rows(batch: pa.RecordBatch, judged: Judged, new: np.ndarray) -> pa.RecordBatch:
    """The rows of the batch that keep the contract and are new, as validated rows.

    Args:
        new: For each row in `judged.rows`, whether no earlier row is the same.
    """
    places = batch.select(PLACE).take(pa.array(judged.kept))
    rows = pa.RecordBatch.from_arrays([*places.columns, *judged.rows.columns], schema=ROWS)
    return rows if new.all() else rows.filter(pa.array(new))


def rejected_rows(batch: pa.RecordBatch, judged: Judged, new: np.ndarray) -> pa.RecordBatch:
    """All other rows of the batch in their order, with their reasons."""
    duplicates = judged.kept[~new]
    reasons = [*judged.reasons, *([str(Reason.EXACT_DUPLICATE)] for _ in duplicates)]
    positions = np.concatenate((judged.refused, duplicates))
    order = np.argsort(positions)
    found = batch.take(pa.array(positions[order]))
    arrays = [
        *(found.column(name) for name in PLACE),
        pa.array([reasons[i] for i in order], REJECTS.field("reasons").type),
        found.column("content"),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=REJECTS)


def group_columns(paths: list[Path], shapes: Sequence[SourceShape]) -> list[str | None]:
    """The column with the group key for each source: the mapped one, else a well-known one that its rows carry, else None."""
    found: list[str | None] = [shape.columns.get("group") for shape in shapes]
    unknown = {i for i, column in enumerate(found) if column is None}
    if not unknown:
        return found
    key = f'"(?:{"|".join(GROUP_COLUMNS)})":'
    for batch in parquet.read_batches(paths, ["source", "content"]):
        if not unknown:
            break
        hits = batch.filter(pc.match_substring_regex(batch.column("content"), key))
        sources = hits.column("source").to_pylist()
        rows = [orjson.loads(content) for content in hits.column("content").to_pylist()]
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
            f"{rejected:,} of {read:,} rows ({rate:.2%}) were rejected, at most {bound:.2%} may be{': ' + named if named else ''}",
            evidence,
        ),
        Check(
            "counts_add_up",
            accepted + rejected == read,
            f"{accepted:,} accepted + {rejected:,} quarantined = {accepted + rejected:,} of {read:,} read",
            {name: number(counts[name]) for name in ("read", "accepted", "quarantined")},
        ),
        Check("has_rows", accepted > 0, f"{accepted:,} rows were accepted", {"rows": number(accepted)}),
    )


def _evidence(
    out: Path, counts: dict[str, int], statistics: Statistics, painter: Painter
) -> dict[str, Evidence]:
    prompt, completion = statistics.prompt_characters, statistics.completion_characters
    painter.draw(
        charts.histogram,
        out / "plots" / "characters.png",
        {"prompt": prompt, "completion": completion},
        title="Characters per row",
        x="characters",
    )
    reasons = reason_table(out / "quarantine.parquet")
    lengths = [
        {
            "part": name,
            "mean": round(float(a.mean()), 1),
            "median": int(np.median(a)),
            "longest": int(a.max()),
        }
        for name, a in (("prompt", prompt), ("completion", completion))
        if len(a)
    ]
    return {
        "row_count": number(counts["accepted"]),
        "quarantined": number(counts["quarantined"]),
        "groups": number(counts["groups"]),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
        "reasons": table(list(reasons)),
        "warnings": table(
            [
                {"warning": w, "rows": n}
                for w, n in sorted(statistics.warnings.items(), key=lambda x: (-x[1], x[0]))
            ]
        ),
        "roles": table(
            [
                {"role": r, "messages": n}
                for r, n in sorted(statistics.roles.items(), key=lambda x: (-x[1], x[0]))
            ]
        ),
        "turns": table([{"replies per row": t, "rows": n} for t, n in sorted(statistics.turns.items())[:20]]),
        "lengths": table(lengths),
        "characters": plot("plots/characters.png"),
        "report": markdown((out / "quarantine.md").read_text(encoding="utf-8")[:20_000]),
    }

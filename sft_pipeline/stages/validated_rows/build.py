"""Builds validated_rows: raw rows as conversations that keep the contract, and everything else in quarantine."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages import charts, tables
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, markdown, number, plot, table
from sft_pipeline.stages.validated_rows.config import SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.contract import group_of, judge, warnings_of
from sft_pipeline.stages.validated_rows.formats import Conversation, look_up, normalise
from sft_pipeline.stages.validated_rows.quarantine import Reason, reason_table, write_report
from sft_pipeline.stages.validated_rows.rows import MESSAGE, ROWS, time_of

GROUP_COLUMNS = ("group", "group_id", "thread_id", "conversation_id")


def build(b: Build) -> Built:
    """Validates every raw row; writes rows/, quarantine.parquet and quarantine.md."""
    config: ValidatedRowsConfig = b.config
    raw = b.inputs["raw_rows"]
    raw_rejects = [raw.file("rejects.parquet")]
    undecodable, decoded = tables.count_rows(raw_rejects), tables.count_rows(raw.parts("rows"))
    quarantine_path = b.out / "quarantine.parquet"
    validator = Validator(config, group_columns(raw.parts("rows"), config.shapes))
    with (
        tables.PartWriter(b.out / "rows", ROWS) as rows,
        tables.FileWriter(quarantine_path, tables.REJECTS) as quarantine,
    ):
        for batch in tables.read_batches(raw_rejects):
            quarantine.write(batch)
        for batch in tables.read_batches(raw.parts("rows"), batch_rows=2_048):
            accepted, rejected = validator.batch(batch)
            rows.write(accepted)
            quarantine.append(rejected)
            b.report.progress("validate", rows.rows + quarantine.rows - undecodable, decoded, "rows")
    counts = {
        "read": undecodable + decoded,
        "accepted": tables.count_rows(sorted((b.out / "rows").glob("*.parquet"))),
        "quarantined": tables.count_rows([quarantine_path]),
        "undecodable": undecodable,
        "warned": validator.warned,
        "groups": len(validator.groups),
    }
    write_report(b.out / "quarantine.md", quarantine_path, counts["read"], validator.warnings)
    return Built(
        counts=counts,
        checks=_checks(config, counts, quarantine_path),
        volatile=("plots/",),
        evidence=_evidence(b.out, counts, validator),
    )


class Validator:
    """Validates rows batch by batch; remembers 16 bytes per accepted row, to find exact duplicates."""

    def __init__(self, config: ValidatedRowsConfig, groups: Sequence[str | None]) -> None:
        self._config, self._group_columns = config, groups
        self._seen: set[bytes] = set()
        self.groups: set[bytes] = set()
        self.warnings: Counter[str] = Counter()
        self.warned = 0
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.prompt_characters, self.completion_characters = array("Q"), array("Q")

    def batch(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, list[dict[str, Any]]]:
        """The accepted rows of a batch of raw rows, and the rejected ones."""
        accepted: list[int] = []
        rejected: list[dict[str, Any]] = []
        groups: list[str] = []
        times: list[str | None] = []
        warnings: list[list[str]] = []
        found: list[Conversation] = []
        ids, sources, contents = (batch.column(n).to_pylist() for n in ("row_id", "source", "content"))
        for i, (row_id, source, content) in enumerate(zip(ids, sources, contents)):
            conversation, group, time = self._row(row_id, source, json.loads(content))
            if conversation.reasons:
                place = {n: batch.column(n)[i].as_py() for n in ("file", "line")}
                rejected.append(
                    {
                        "row_id": row_id,
                        "source": source,
                        **place,
                        "reasons": [str(r) for r in conversation.reasons],
                        "raw": content,
                    }
                )
                continue
            accepted.append(i)
            found.append(conversation)
            groups.append(group)
            times.append(time)
            warnings.append(self._count(conversation, group))
        return _rows_batch(
            batch.take(pa.array(accepted, pa.int32())), groups, found, times, warnings
        ), rejected

    def _row(self, row_id: str, source: int, row: dict[str, Any]) -> tuple[Conversation, str, str | None]:
        shape = self._config.shapes[source]
        conversation = normalise(shape.format, row, shape.columns)
        judge(conversation, self._config.contract)
        group = self._group(row, source, conversation)
        time = None
        if self._config.time_column:
            time = time_of(look_up(row, self._config.time_column))
            if time is None:
                conversation.refuse(Reason.INVALID_TIME)
        if not conversation.reasons and self._is_duplicate(conversation, group):
            conversation.refuse(Reason.EXACT_DUPLICATE)
        return conversation, group or row_id, time

    def _group(self, row: dict[str, Any], source: int, conversation: Conversation) -> str:
        """The row's group; "" where the row is its own."""
        column = self._group_columns[source]
        group = group_of(look_up(row, column)) if column else None
        if isinstance(group, Reason):
            conversation.refuse(group)
        elif group:
            return group
        required = self._config.contract.require_group
        if required or (required is None and column):
            conversation.refuse(Reason.MISSING_GROUP)
        return ""

    def _is_duplicate(self, conversation: Conversation, group: str) -> bool:
        """Rows that are their own group are compared by their messages alone."""
        content = [
            group,
            conversation.tools,
            [[m["role"], m["content"], m["weight"], m["tool_calls"]] for m in conversation.messages],
        ]
        key = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()
        if key in self._seen:
            return True
        self._seen.add(key)
        return False

    def _count(self, conversation: Conversation, group: str) -> list[str]:
        warnings = warnings_of(conversation.messages)
        self.warned += bool(warnings)
        self.warnings.update(warnings)
        self.groups.add(hashlib.blake2b(group.encode(), digest_size=8).digest())
        self.roles.update(m["role"] for m in conversation.messages)
        self.turns[sum(m["role"] == "assistant" for m in conversation.messages)] += 1
        self.prompt_characters.append(sum(len(m["content"]) for m in conversation.messages[:-1]))
        self.completion_characters.append(
            len(conversation.messages[-1]["content"]) + len(conversation.messages[-1]["tool_calls"] or "")
        )
        return warnings


def _rows_batch(
    places: pa.RecordBatch,
    groups: list[str],
    conversations: list[Conversation],
    times: list[str | None],
    warnings: list[list[str]],
) -> pa.RecordBatch:
    offsets = np.zeros(len(conversations) + 1, np.int32)
    np.cumsum([len(c.messages) for c in conversations], out=offsets[1:])
    flat = [m for c in conversations for m in c.messages]
    parts = [pa.array([m[f.name] for m in flat], f.type) for f in MESSAGE]
    messages = pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays(parts, fields=list(MESSAGE))
    )
    return pa.RecordBatch.from_arrays(
        [
            *(places.column(n) for n in ("row_id", "source", "file", "line")),
            pa.array(groups, pa.string()),
            messages,
            pa.array([c.tools for c in conversations], pa.string()),
            pa.array(times, pa.string()),
            pa.array(warnings, pa.list_(pa.string())),
        ],
        schema=ROWS,
    )


def group_columns(paths: list[Path], shapes: Sequence[SourceShape]) -> list[str | None]:
    """The column with the group key for each source: the mapped one, else a well-known one that its rows carry, else None."""
    found: list[str | None] = [shape.columns.get("group") for shape in shapes]
    unknown = {i for i, column in enumerate(found) if column is None}
    if not unknown:
        return found
    for batch in tables.read_batches(paths, ["source", "content"]):
        if not unknown:
            break
        content = batch.column("content")
        for name in GROUP_COLUMNS:
            hits = batch.filter(pc.match_substring(content, f'"{name}":'))
            for source, row in zip(hits.column("source").to_pylist(), hits.column("content").to_pylist()):
                if source in unknown and json.loads(row).get(name) not in (None, ""):
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
            "first": table(list(tables.first_offenders(quarantine))),
        }
    return (
        Check(
            "reject_rate", rate <= bound, f"{rejected:,} of {read:,} rows ({rate:.2%}) were rejected, at most {bound:.2%} may be{': ' + named if named else ''}", evidence
        ),
        Check(
            "counts_add_up", accepted + rejected == read, f"{accepted:,} accepted + {rejected:,} quarantined = {accepted + rejected:,} of {read:,} read",
            {name: number(counts[name]) for name in ("read", "accepted", "quarantined")},
        ),
        Check("has_rows", accepted > 0, f"{accepted:,} rows were accepted", {"rows": number(accepted)}),
    )  # fmt: skip


def _evidence(out: Path, counts: dict[str, int], validator: Validator) -> dict[str, Evidence]:
    prompt, completion = (
        np.array(a, dtype=np.int64) for a in (validator.prompt_characters, validator.completion_characters)
    )
    charts.histogram(
        out / "plots" / "characters.png",
        {"prompt": prompt, "completion": completion},
        title="Characters per row",
        x="characters",
    )
    reasons = reason_table(out / "quarantine.parquet")
    lengths = [
        {"part": name, "mean": round(float(a.mean()), 1), "median": int(np.median(a)), "longest": int(a.max())}
        for name, a in (("prompt", prompt), ("completion", completion)) if len(a)
    ]  # fmt: skip
    return {
        "row_count": number(counts["accepted"]),
        "quarantined": number(counts["quarantined"]),
        "groups": number(counts["groups"]),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
        "reasons": table(list(reasons)),
        "warnings": table(
            [
                {"warning": w, "rows": n}
                for w, n in sorted(validator.warnings.items(), key=lambda x: (-x[1], x[0]))
            ]
        ),
        "roles": table(
            [
                {"role": r, "messages": n}
                for r, n in sorted(validator.roles.items(), key=lambda x: (-x[1], x[0]))
            ]
        ),
        "turns": table([{"replies per row": t, "rows": n} for t, n in sorted(validator.turns.items())[:20]]),
        "lengths": table(lengths),
        "characters": plot("plots/characters.png"),
        "report": markdown((out / "quarantine.md").read_text(encoding="utf-8")[:20_000]),
    }

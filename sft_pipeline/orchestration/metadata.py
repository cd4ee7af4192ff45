"""How a stage's results and progress look in Dagster: evidence as metadata, and lines of the event log."""

import base64
import time
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from sft_pipeline.reporting import Reporter
from sft_pipeline.secret_text import redacted
from sft_pipeline.stages.stage import Evidence
from sft_pipeline.store import Artifact

STANDARD_NAMES = {"row_count": "dagster/row_count", "column_schema": "dagster/column_schema"}


def to_metadata(evidence: Mapping[str, Evidence], artifact: Artifact) -> dict[str, Any]:
    """Metadata entries by name."""
    return {STANDARD_NAMES.get(name, name): _value(item, artifact) for name, item in evidence.items()}


def _value(item: Evidence, artifact: Artifact) -> Any:
    match item.kind:
        case "number":
            return (
                dg.MetadataValue.int(item.value)
                if isinstance(item.value, int)
                else dg.MetadataValue.float(float(item.value))
            )
        case "markdown":
            return dg.MetadataValue.md(item.value)
        case "table":
            return _table(item.value)
        case "schema":
            return dg.TableSchema(
                columns=[dg.TableColumn(name, str(kind)) for name, kind in item.value.items()]
            )
        case "plot":
            image = base64.b64encode(artifact.file(item.value).read_bytes()).decode()
            return dg.MetadataValue.md(f"![{item.value}](data:image/png;base64,{image})")
        case "path":
            return dg.MetadataValue.path(str(item.value))
        case "url":
            return dg.MetadataValue.url(str(item.value))
        case _:
            return dg.MetadataValue.text(str(item.value))


def _table(rows: list[dict[str, Any]]) -> Any:
    if not rows:
        return dg.MetadataValue.text("none")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return dg.MetadataValue.table(
        records=[dg.TableRecord({c: _cell(row.get(c)) for c in columns}) for row in rows],
        schema=dg.TableSchema(
            columns=[dg.TableColumn(c, _column_type([row.get(c) for row in rows])) for c in columns]
        ),
    )


def _cell(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _column_type(values: list[Any]) -> str:
    kinds = {type(v) for v in values if v is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int"
    return "float" if kinds and kinds <= {int, float} else "string"


class DagsterReporter(Reporter):
    """Dagster's event log: every log line, and progress and metrics at most every `every_seconds`."""

    def __init__(self, context: dg.AssetExecutionContext, every_seconds: float = 10.0) -> None:
        self._log = context.log
        self._every = every_seconds
        self._last: dict[str, float] = {}

    def _due(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(what, float("-inf")) < self._every:
            return False
        self._last[what] = now
        return True

    def log(self, message: str, level: str = "info") -> None:
        getattr(self._log, level)(redacted(message))

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        if self._due(f"progress {name}") or done == total:
            share = f" ({done / total:.0%})" if total else ""
            self._log.info(f"{name}: {done:,.0f}{f' of {total:,.0f}' if total else ''} {unit}{share}")

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if "val_loss" in values or self._due("metrics"):
            self._log.info(f"update {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        lines = [f"  {r.get('prompt', '')!s:.120} -> {r.get('reply', '')!s:.200}" for r in rows[:3]]
        self._log.info(f"samples at update {step}:\n" + "\n".join(lines))

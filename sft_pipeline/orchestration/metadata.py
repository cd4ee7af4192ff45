"""Evidence as Dagster metadata: numbers that are plotted over time, tables, pictures."""

import base64
from collections.abc import Mapping
from typing import Any

import dagster as dg

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
            picture = base64.b64encode(artifact.file(item.value).read_bytes()).decode()
            return dg.MetadataValue.md(f"![{item.value}](data:image/png;base64,{picture})")
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

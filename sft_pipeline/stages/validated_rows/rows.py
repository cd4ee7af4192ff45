"""What a validated row is: the schema that later stages read."""

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

MESSAGE = pa.struct(
    [("role", pa.string()), ("content", pa.string()), ("weight", pa.float32()), ("tool_calls", pa.string())]
)
ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("group", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("tools", pa.string()),
        ("time", pa.string()),
        ("warnings", pa.list_(pa.string())),
    ]
)
"""`weight` null: the default. `tool_calls`, `tools`: JSON text or null. `time`: as `time_of` writes it, or null."""


def time_of(value: Any) -> str | None:
    """An ISO time in UTC, to the microsecond, so that text order is time order; None where the value is no ISO time."""
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value.strip())
        return (time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)).isoformat(
            timespec="microseconds"
        )
    except (ValueError, OverflowError):
        return None

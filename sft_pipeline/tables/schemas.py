"""The tables that stages hand to each other, and the key by which a row is recognised in another snapshot."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import pyarrow as pa

KEY_BYTES = 16

IGNORE_LABEL = -100
"""The label of a position without loss, as torch's cross_entropy and transformers have it."""

MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("reasoning_content", pa.string()),
        ("tool_calls", pa.string()),
        ("name", pa.string()),
        ("tool_call_id", pa.string()),
        ("weight", pa.float32()),
        ("input_at", pa.int32()),
    ]
)
"""A message. All but the role may be null: the source row has no such field. `tool_calls`: JSON text, a list
of {type: function, function: {name, arguments}, ...} with keys, strings and numbers as the row spells them;
`arguments` is JSON text within it where it is in the row. `weight` null: 1. `input_at`: where in `content`
the row's input (Alpaca) or context (Dolly) begins, which some templates put under a heading of its own."""
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
        ("content_key", pa.binary(KEY_BYTES)),
    ]
)
"""validated_rows and grouped_split. `tools`: JSON text with keys, strings and numbers as the row spells them,
or null.
`time`: as `time_of` writes it, or null. `content_key`: equal for rows with the same messages and tools,
whatever their file, line, name or group."""

TOKENIZED = pa.schema(
    [
        ("row_id", pa.string()),  # further parts of a split row: "<row_id>/1", "/2", ...
        ("group", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),  # the input id where it carries loss, else -100
        # what each token counts for in the loss, 0 without a label; null: every one with a label counts 1
        ("weights", pa.list_(pa.float32())),
        ("length", pa.int32()),
        ("supervised", pa.int32()),  # positions with a label
        ("prompt_length", pa.int32()),  # tokens of the prompt a server would send before the final turn
        # tokens cut off the end, where supervised ones are among them, or off the prompt; else 0
        ("truncated", pa.int32()),
        ("completion", pa.string()),  # the final assistant message, for graders
    ]
)

RAW_ROWS = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("content", pa.string()),
    ]
)
"""raw_rows, and what is joined to them. `content`: JSON as it was written."""

REJECTS = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reasons", pa.list_(pa.string())),
        ("raw", pa.string()),
        ("details", pa.list_(pa.string())),
    ]
)
"""rejects.parquet and quarantine.parquet of every stage: the row's origin, all reasons, the raw row; for each
reason what of the row it is about (a field, a token, a partner), "" or null where there is nothing to say."""

MADE = pa.schema([("row_id", pa.string()), ("made_of", pa.string())])
"""made/ of validated_rows, where there is one: rows that have an id of their own, since they were made of
several rows or are one of several that were made of a row, and the ids of those rows."""

SHAPES_FILE = "shapes.json"
"""Beside validated rows: how the rows of each source read, with the format that `auto` stood for."""

SPLITS = ("train", "validation", "test")


def content_key(messages: Sequence[Mapping[str, Any]], tools: str | None) -> bytes:
    """128-bit digest of a row's messages and tools; each message has the fields of `MESSAGE` in order."""
    return digest(orjson.dumps([tools, messages]))


def digest(data: bytes) -> bytes:
    """128 bits that stand for the data."""
    return hashlib.blake2b(data, digest_size=KEY_BYTES).digest()


def derived_row_id(row_id: str, number: int, count: int) -> str:
    """The id of one of several rows that were made of a row; of a single one, the row's own."""
    return row_id if count == 1 else digest(f"{row_id}/{number}".encode()).hex()


def time_of(value: Any) -> str | None:
    """An ISO time in UTC, to the microsecond, so that text order is time order; None for any other value."""
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value.strip())
        in_utc = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        return in_utc.isoformat(timespec="microseconds")
    except (ValueError, OverflowError):
        return None

"""Judges a batch of raw rows: a pure function of the batch, so that it can run in any process.

What depends on the other batches (exact duplicates, totals) is left to `build.py`.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa

from sft_pipeline.stages.raw_rows.lines import has_huge_number
from sft_pipeline.stages.validated_rows.config import ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.contract import group_of, judge, may_warn, warnings_of
from sft_pipeline.stages.validated_rows.formats import Conversation, look_up, normalise
from sft_pipeline.stages.validated_rows.quarantine import Reason
from sft_pipeline.tables.schemas import KEY_BYTES, MESSAGE, ROWS, content_key, digest, time_of

JUDGED = pa.schema(
    [ROWS.field(name) for name in ("group", "messages", "tools", "time", "warnings", "content_key")]
)
KEY = np.dtype(f"S{KEY_BYTES}")


class Judged(NamedTuple):
    """A batch of raw rows, judged. Positions are those of the rows in the batch.

    Attributes:
        kept: Positions (int32) of the rows that keep the contract.
        rows: What they are made into; columns of `JUDGED`.
        keys: 128-bit digests (`KEY`), equal for exact duplicates.
        groups: 128-bit digests (`KEY`) of the groups.
        refused: Positions (int32) of the other rows.
        reasons: Why, for each of them.
    """

    kept: np.ndarray
    rows: pa.RecordBatch
    keys: np.ndarray
    groups: np.ndarray
    refused: np.ndarray
    reasons: list[list[str]]


class Judge:
    """Judges batches of raw rows under one configuration.

    Args:
        group_columns: For each source the column with the group key, or None.
    """

    def __init__(self, config: ValidatedRowsConfig, group_columns: Sequence[str | None]) -> None:
        self._config, self._group_columns = config, group_columns

    def __call__(self, batch: pa.RecordBatch) -> Judged:
        """Judges a batch with the columns of raw_rows' rows/."""
        kept: list[int] = []
        refused: list[int] = []
        reasons: list[list[str]] = []
        groups: list[str] = []
        times: list[str | None] = []
        found: list[Conversation] = []
        contents: list[bytes] = []
        keys: list[bytes] = []
        group_keys: list[bytes] = []
        ids, sources = batch.column("row_id").to_pylist(), batch.column("source").to_pylist()
        for i, row in enumerate(_contents(batch.column("content"))):
            conversation, group, time = self._row(sources[i], row)
            if conversation.reasons:
                refused.append(i)
                reasons.append([str(r) for r in conversation.reasons])
                continue
            kept.append(i)
            found.append(conversation)
            contents.append(key := content_key(conversation.messages, conversation.tools))
            groups.append(group or ids[i])
            # A row that is its own group is compared by its content alone, and its id is a digest already.
            keys.append(digest(key + group.encode()) if group else key)
            group_keys.append(digest(group.encode()) if group else bytes.fromhex(ids[i]))
            times.append(time)
        return Judged(
            np.array(kept, np.int32),
            _rows_batch(groups, found, times, contents),
            np.array(keys, KEY),
            np.array(group_keys, KEY),
            np.array(refused, np.int32),
            reasons,
        )

    def _row(self, source: int, row: dict[str, Any]) -> tuple[Conversation, str, str | None]:
        """The row's conversation, its group ("" where it is its own) and its time."""
        shape = self._config.shapes[source]
        conversation = normalise(shape.format, row, shape.columns)
        judge(conversation, self._config.contract)
        group = self._group(row, source, conversation)
        time = None
        if self._config.time_column:
            time = time_of(look_up(row, self._config.time_column))
            if time is None:
                conversation.refuse(Reason.INVALID_TIME)
        return conversation, group, time

    def _group(self, row: dict[str, Any], source: int, conversation: Conversation) -> str:
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


def _contents(column: pa.StringArray) -> list[dict[str, Any]]:
    """The rows' values. orjson reads what raw_rows wrote as Python would, except for huge whole numbers."""
    contents: list[bytes] = column.cast(pa.binary()).to_pylist()
    if has_huge_number(b"\n".join(contents)):
        return [(json if has_huge_number(content) else orjson).loads(content) for content in contents]
    return list(map(orjson.loads, contents))


def _rows_batch(
    groups: list[str], conversations: list[Conversation], times: list[str | None], contents: list[bytes]
) -> pa.RecordBatch:
    offsets = np.zeros(len(conversations) + 1, np.int32)
    np.cumsum([len(c.messages) for c in conversations], out=offsets[1:])
    flat = [m for c in conversations for m in c.messages]
    columns = [pa.array([m[f.name] for m in flat], f.type) for f in MESSAGE]
    messages = pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays(columns, fields=list(MESSAGE))
    )
    warnings: list[list[str]] = [[] for _ in conversations]
    suspects = np.flatnonzero(may_warn(columns[1]) | may_warn(columns[3]))
    for i in np.unique(np.searchsorted(offsets, suspects, side="right") - 1).tolist():
        warnings[i] = warnings_of(conversations[i].messages)
    arrays = [
        pa.array(groups, pa.string()),
        messages,
        pa.array([c.tools for c in conversations], pa.string()),
        pa.array(times, pa.string()),
        pa.array(warnings, pa.list_(pa.string())),
        pa.array(contents, pa.binary(KEY_BYTES)),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=JUDGED)

"""Validates a batch of raw rows against the row contract: what a conversation must be for a model to learn
from it.

A pure function of the batch, so that it can run in any process. What depends on other batches (exact
duplicates, totals) is left to `build.py`.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.validated_rows.config import ContractConfig, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.formats import look_up, normalize
from sft_pipeline.stages.validated_rows.normalized_row import MISSING, Message, NormalizedRow
from sft_pipeline.stages.validated_rows.reshape import CannotReshape, Reshaper, columns_in
from sft_pipeline.stages.validated_rows.turns import arrange
from sft_pipeline.stages.validated_rows.unknown_fields import UnknownFields
from sft_pipeline.tables import literal_json
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import KEY_BYTES, MESSAGE, ROWS, content_key, digest, time_of
from sft_pipeline.tables.strict_json import read_canonical

VALIDATED = pa.schema(
    [ROWS.field(name) for name in ("group", "messages", "tools", "time", "warnings", "content_key")]
)
TEXT_FIELDS = ("content", "reasoning_content", "tool_calls", "name")
_TEXT_COLUMNS = tuple(MESSAGE.get_field_index(name) for name in TEXT_FIELDS)
KEY = np.dtype(f"S{KEY_BYTES}")

# Control tokens of the families in use. In a text one of these would forge a turn if it were tokenized as
# itself.
CONTROL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>"  # ChatML, Llama 3, Phi, GPT-NeoX and many more
    r"|<｜[^｜>]{1,40}｜>"  # DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_(?:turn|image)>"  # SentencePiece families, Gemma
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]|\[TOOL_CALLS\]|<</?SYS>>"  # Llama 2, Mistral
    r"|</?(?:think|tool_call|tool_response|tools)>"  # Qwen
)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
# For Arrow's RE2, which has no look-around: neither pattern may use it.
_EITHER = f"{CONTROL_TOKEN.pattern}|{_CONTROL_CHARACTER.pattern}"

# Which roles may follow which; None is the beginning.
_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant"),
}


class ValidatedBatch(NamedTuple):
    """What came of a batch of raw rows. Positions are those of the rows in the batch.

    Attributes:
        kept: Positions (int32) of the rows that keep the contract; one may be there several times.
        ids: Row ids of what they are made into.
        rows: What they are made into; columns of `VALIDATED`.
        keys: 128-bit digests (`KEY`), equal for exact duplicates.
        groups: 128-bit digests (`KEY`) of the groups.
        rejected: Positions (int32) of the other rows.
        rejected_ids: Their row ids.
        reasons: Why, for each of them.
        details: What of the row each reason is about.
        unused: Rows (or messages) by the key that nothing reads.
        arranged: Turns by what `contract` had done with them.
        added: Rows that `transform` made beyond one of each.
    """

    kept: np.ndarray
    ids: list[str]
    rows: pa.RecordBatch
    keys: np.ndarray
    groups: np.ndarray
    rejected: np.ndarray
    rejected_ids: list[str]
    reasons: list[list[str]]
    details: list[list[str]]
    unused: Counter[str]
    arranged: Counter[str]
    added: int


class RowValidator:
    """Validates batches of raw rows under one configuration.

    Args:
        group_columns: For each source the column with the group key, or None.
    """

    def __init__(self, config: ValidatedRowsConfig, group_columns: Sequence[str | None]) -> None:
        self._config, self._group_columns = config, group_columns
        columns = {shape.columns.get("tools", "tools").split(".")[0] for shape in config.shapes}
        names = "|".join(map(re.escape, sorted({"tool_calls", "function_call", "functions", *columns})))
        self._has_tools = re.compile(f'"(?:{names})"'.encode())
        time = [config.time_column] if config.time_column else []
        self._unknown = [
            UnknownFields(
                shape.format,
                shape.columns,
                [*time, *([group] if group else []), *columns_in(shape.text)],
                shape.unused,
            )
            for shape, group in zip(config.shapes, group_columns, strict=True)
        ]
        self._reshapers = [Reshaper(shape, f"sources[{i}]") for i, shape in enumerate(config.shapes)]
        self._arranged: Counter[str] = Counter()

    def __call__(self, batch: pa.RecordBatch) -> ValidatedBatch:
        """Validates a batch with the columns of raw_rows' rows/."""
        kept, ids, found = _Kept(), batch.column("row_id").to_pylist(), _Rejected()
        sources, added = batch.column("source").to_pylist(), 0
        for i, row in enumerate(self._read(batch.column("content").cast(pa.binary()).to_pylist())):
            reshaper = self._reshapers[sources[i]]
            rows = [(ids[i], row)]
            if reshaper.is_needed:
                try:
                    rows = list(reshaper(ids[i], row))
                except CannotReshape as error:
                    found.add(i, ids[i], [str(error.reason)], [error.detail])
                    continue
                added += len(rows) - 1
            for row_id, each in rows:
                normalized, group, time = self._validate(sources[i], each)
                if normalized.reasons:
                    found.add(i, row_id, normalized.reasons, normalized.details)
                else:
                    kept.add(i, row_id, normalized, group, time)
        return ValidatedBatch(
            np.array(kept.positions, np.int32),
            kept.ids,
            _to_batch(kept.groups, kept.rows, kept.times, kept.contents),
            np.array(kept.keys, KEY),
            np.array(kept.group_keys, KEY),
            np.array(found.positions, np.int32),
            found.ids,
            found.reasons,
            found.details,
            *self._take_counts(),
            added,
        )

    def _read(self, contents: list[bytes]) -> list[dict[str, Any]]:
        """The rows; in those that have tools or calls, numbers keep their spelling."""
        rows = read_canonical(contents)
        for i, content in enumerate(contents):
            if self._has_tools.search(content):
                rows[i] = literal_json.loads(content.decode())
        return rows

    def _take_counts(self) -> tuple[Counter[str], Counter[str]]:
        """(unused, arranged) since the last time."""
        total: Counter[str] = Counter()
        for unknown in self._unknown:
            total += unknown.counts
            unknown.counts.clear()
        arranged, self._arranged = self._arranged, Counter()
        return total, arranged

    def _validate(self, source: int, row: dict[str, Any]) -> tuple[NormalizedRow, str, str | None]:
        """The normalized row, its group ("" where it is its own) and its time."""
        contract, shape = self._config.contract, self._config.shapes[source]
        normalized = normalize(shape.format, row, shape.columns, shape.roles)
        if contract.arranges_turns:
            normalized.messages, left = arrange(normalized.messages, contract)
            self._arranged += left
        check_contract(normalized, contract)
        for name in self._unknown[source].find(row):
            normalized.reject(RejectReason.UNUSED_FIELD, name)
        column = self._group_columns[source]
        group = group_of(look_up(row, column)) if column else None
        if isinstance(group, RejectReason):
            normalized.reject(group, detail=str(column))
            group = None
        if not group and (contract.require_group or (contract.require_group is None and column is not None)):
            normalized.reject(RejectReason.MISSING_GROUP, detail=column or "")
        time = None
        if self._config.time_column:
            time = time_of(look_up(row, self._config.time_column))
            if time is None:
                normalized.reject(RejectReason.INVALID_TIME, detail=self._config.time_column)
        return normalized, group or "", time


class _Kept:
    """Rows that keep the contract, as columns."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.ids: list[str] = []
        self.groups: list[str] = []
        self.times: list[str | None] = []
        self.rows: list[NormalizedRow] = []
        self.contents: list[bytes] = []
        self.keys: list[bytes] = []
        self.group_keys: list[bytes] = []

    def add(self, position: int, row_id: str, row: NormalizedRow, group: str, time: str | None) -> None:
        self.positions.append(position)
        self.ids.append(row_id)
        self.rows.append(row)
        self.contents.append(key := content_key(row.messages, row.tools))
        key = _spelling_aside(row) or key
        self.groups.append(group or row_id)
        # A row that is its own group is compared by its content alone, and its id is a digest already.
        self.keys.append(digest(key + group.encode()) if group else key)
        self.group_keys.append(digest(group.encode()) if group else bytes.fromhex(row_id))
        self.times.append(time)


class _Rejected:
    """The other rows, as columns."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.ids: list[str] = []
        self.reasons: list[list[str]] = []
        self.details: list[list[str]] = []

    def add(self, position: int, row_id: str, reasons: list[str], details: list[str]) -> None:
        self.positions.append(position)
        self.ids.append(row_id)
        self.reasons.append(reasons)
        self.details.append(details)


def _spelling_aside(row: NormalizedRow) -> bytes | None:
    """The key of a row whatever the order of keys in its tools and calls, and wherever its input begins; None
    for a row that has nothing of these.
    """
    if not row.tools and not any(m["tool_calls"] or m["input_at"] for m in row.messages):
        return None

    def sorted_json(text: str | None) -> str | None:
        return text and json.dumps(json.loads(text), sort_keys=True)

    messages = [{**m, "tool_calls": sorted_json(m["tool_calls"]), "input_at": None} for m in row.messages]
    return content_key(messages, sorted_json(row.tools))


def _to_batch(
    groups: list[str], rows: list[NormalizedRow], times: list[str | None], contents: list[bytes]
) -> pa.RecordBatch:
    """Rows with the columns of `VALIDATED`."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row.messages) for row in rows], out=offsets[1:])
    flat = [m for row in rows for m in row.messages]
    columns = [pa.array([m[f.name] for m in flat], f.type) for f in MESSAGE]
    messages = pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays(columns, fields=list(MESSAGE))
    )
    # Nearly all rows have no warning: one pass over the whole columns finds those that may have one.
    warnings: list[list[str]] = [[] for _ in rows]
    suspects = np.flatnonzero(np.logical_or.reduce([may_warn(columns[i]) for i in _TEXT_COLUMNS]))
    for i in np.unique(np.searchsorted(offsets, suspects, side="right") - 1).tolist():
        warnings[i] = warnings_of(rows[i].messages)
    arrays = [
        pa.array(groups, pa.string()),
        messages,
        pa.array([row.tools for row in rows], pa.string()),
        pa.array(times, pa.string()),
        pa.array(warnings, pa.list_(pa.string())),
        pa.array(contents, pa.binary(KEY_BYTES)),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=VALIDATED)


def check_contract(row: NormalizedRow, contract: ContractConfig) -> None:
    """Adds to the row's reasons everything in which its conversation breaks the contract."""
    messages = row.messages
    if not messages and row.reasons:
        return
    if not _alternates(messages):
        row.reject(RejectReason.ROLES_DO_NOT_ALTERNATE, detail=_role_order(messages))
    if not messages or messages[-1]["role"] not in ("assistant", ""):
        last = messages[-1]["role"] if messages else ""
        row.reject(RejectReason.NO_FINAL_COMPLETION, detail=f"ends with {last}" if last else "no messages")
        _check_prompt(row, messages, contract)
    else:
        _check_prompt(row, messages[:-1], contract)
        _check_completion(row, messages[-1], contract)


def _alternates(messages: list[Message]) -> bool:
    """Whether every role may follow the one before it; true where one is unknown: that has its own reason."""
    before = None
    called = False
    follows = True
    for message in messages:
        role = message["role"]
        if not role:
            return True
        if role not in _FOLLOWS[before] and not (before == "assistant" and called and role == "tool"):
            follows = False
        before, called = role, message["tool_calls"]
    return follows


def _role_order(messages: list[Message]) -> str:
    """The first roles, up to the one that may not follow."""
    before, called, found = None, None, []
    for message in messages:
        role = message["role"]
        found.append(role)
        if role not in _FOLLOWS[before] and not (before == "assistant" and called and role == "tool"):
            break
        before, called = role, message["tool_calls"]
    return f"{'… ' if len(found) > 4 else ''}{', '.join(found[-4:])}"


def _check_prompt(row: NormalizedRow, messages: list[Message], contract: ContractConfig) -> None:
    length = 0
    any_text = any_empty = False
    for message in messages:
        content, calls, reasoning = message["content"], message["tool_calls"], message["reasoning_content"]
        if content is None:
            return
        length += len(content) + len(calls or "") + len(reasoning or "")
        if message["role"] != "system":
            if content.strip():
                any_text = True
            elif not calls and not reasoning and message["role"] != "tool":
                any_empty = True
    if not any_text:
        if contract.min_prompt_chars:
            row.reject(RejectReason.EMPTY_PROMPT)
    elif any_empty:
        row.reject(RejectReason.EMPTY_MESSAGE)
    elif length < contract.min_prompt_chars:
        row.reject(RejectReason.PROMPT_TOO_SHORT, detail=f"{length:,} characters")
    if length > contract.max_prompt_chars:
        row.reject(RejectReason.PROMPT_TOO_LONG, detail=f"{length:,} characters")


def _check_completion(row: NormalizedRow, message: Message, contract: ContractConfig) -> None:
    content, calls, reasoning = message["content"], message["tool_calls"], message["reasoning_content"]
    if content is None:
        return
    length = len(content) + len(calls or "") + len(reasoning or "")
    if not content.strip() and not calls and not (reasoning or "").strip():
        row.reject(RejectReason.EMPTY_COMPLETION)
    elif length < contract.min_completion_chars:
        row.reject(RejectReason.COMPLETION_TOO_SHORT, detail=f"{length:,} characters")
    if length > contract.max_completion_chars:
        row.reject(RejectReason.COMPLETION_TOO_LONG, detail=f"{length:,} characters")


def may_warn(texts: pa.StringArray) -> np.ndarray:
    """For which texts `warnings_of` finds something (bool)."""
    return pc.fill_null(pc.match_substring_regex(texts, _EITHER), False).to_numpy(zero_copy_only=False)


def warnings_of(messages: list[Message]) -> list[str]:
    """Control tokens that stand literally in the text, and control characters; sorted."""
    found: set[str] = set()
    for message in messages:
        for text in (message.get(name) for name in TEXT_FIELDS):
            if text:
                found.update(f"control_token:{token}" for token in CONTROL_TOKEN.findall(text))
                if _CONTROL_CHARACTER.search(text):
                    found.add("control_character")
    return sorted(found)


def group_of(value: Any) -> str | RejectReason | None:
    """The group key as text (whole numbers too); None where there is none; a reason where it is no key."""
    if isinstance(value, str):
        return value.strip() or None
    if value is MISSING or value is None:
        return None
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_whole else RejectReason.WRONG_TYPE

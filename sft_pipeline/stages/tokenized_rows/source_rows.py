"""The conversation that a source row holds, taken from the row as it was written.

This is what the tokens are compared with, so it shares no code with the formats of validated_rows: whatever
those lose, this still has. Only the roles' names are taken from the normalized row.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.store import Artifact
from sft_pipeline.tables import literal_json
from sft_pipeline.tables.parquet import read_batches
from sft_pipeline.tables.schemas import derived_row_id
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.user_code import import_function

Place = tuple[int, str, int]  # source, file, line

# "{{", "}}", or a column in braces.
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_SIDES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "function_call", "tool_call"),
    "system": ("system", "developer"),
}
_NOT_FOR_TEMPLATES = ("from", "value", "weight", "loss", "loss_weight", "train", "function_call")
_MORE_THAN_TEXT = ("tool_calls", "reasoning", "reasoning_content", "thinking", "name", "tool_call_id")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "null", "[]")


def ancestor(artifact: Artifact, name: str) -> Artifact:
    """The artifact of an earlier stage from which this one was made; it lies beside it."""
    return Artifact(artifact.path.parent / artifact.manifest.inputs[name].fingerprint)


def read_sources(
    raw: Artifact, shapes: Sequence[Mapping[str, Any]], wanted: Mapping[str, Place]
) -> dict[str, dict[str, Any]]:
    """The source rows of which these rows were made, as they were written: what the dataset file says of
    joins, turns, transforms and texts is done to them here anew.

    Args:
        raw: raw_rows.
        shapes: Of the sources, as validated_rows wrote them.
        wanted: {row id: place}.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, shape in enumerate(shapes):
        places = {row_id: place[1:] for row_id, place in wanted.items() if place[0] == number}
        rows = _at_places(raw, number, set(places.values())) if places else {}
        if shape["join"]:
            _join(raw, number, shape["join"], rows)
        if shape["format"] == "turns":
            rows = _dialogues(raw, number, shape, rows)
        for row_id, place in places.items():
            if place in rows and (row := _made_of(rows[place], row_id, shape)) is not None:
                found[row_id] = row
    return found


_Rows = dict[tuple[str, int], tuple[str, dict[str, Any]]]  # by (file, line): row id, row


def _rows_of(raw: Artifact, source: int) -> Iterator[tuple[tuple[str, int], str, str]]:
    """((file, line), row id, content) of all rows of a source."""
    for batch in read_batches(raw.parts("rows"), ["row_id", "source", "file", "line", "content"]):
        for row in batch.filter(pc.equal(batch.column("source"), source)).to_pylist():
            yield (row["file"], row["line"]), row["row_id"], row["content"]


def _at_places(raw: Artifact, source: int, places: set[tuple[str, int]]) -> _Rows:
    lines = pa.array(sorted({line for _, line in places}), pa.int64())
    found: _Rows = {}
    for batch in read_batches(raw.parts("rows"), ["row_id", "source", "file", "line", "content"]):
        near = pc.and_(pc.equal(batch.column("source"), source), pc.is_in(batch.column("line"), lines))
        for row in batch.filter(near).to_pylist():
            if (place := (row["file"], row["line"])) in places:
                found[place] = row["row_id"], literal_json.loads(row["content"])
        if len(found) == len(places):
            break
    return found


def _join(raw: Artifact, source: int, join: Mapping[str, Any], rows: _Rows) -> None:
    """Adds to rows what the joined file has for their keys."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for _, row in rows.values():
        by_key.setdefault(str(_at(row, join["by"])).strip(), []).append(row)
    for batch in read_batches(raw.parts(f"joined/{source}"), ["content"]):
        for content in batch.column(0).to_pylist():
            partner = literal_json.loads(content)
            key = join["key"] or join["by"]
            for row in by_key.get(str(_at(partner, key)).strip(), ()):
                for name, column in (join["fields"] or {n: n for n in partner if n != key}).items():
                    if join["fields"] or name not in row:
                        row[name] = _at(partner, column)


def _dialogues(raw: Artifact, source: int, shape: Mapping[str, Any], rows: _Rows) -> _Rows:
    """The rows, each the first turn of a dialogue, as whole dialogues."""
    columns = shape["columns"]
    named = "dialogue" in columns or any("dialogue" in row for _, row in rows.values())

    def dialogue(place: tuple[str, int], row: Mapping[str, Any]) -> str:
        return str(_at(row, columns.get("dialogue", "dialogue"))).strip() if named else place[0]

    turns: dict[str, list[dict[str, Any]]] = {dialogue(p, row): [] for p, (_, row) in rows.items()}
    for place, row_id, content in _rows_of(raw, source):
        row = literal_json.loads(content)
        joined: _Rows = {place: (row_id, row)}
        if (name := dialogue(place, row)) in turns:
            if shape["join"]:
                _join(raw, source, shape["join"], joined)
            turns[name] += _reshaped(joined[place][1], shape)

    def order(turn: Mapping[str, Any]) -> tuple[bool, float, str]:
        text = str(_at(turn, columns["order"])).strip()
        try:
            return True, float(text), ""
        except ValueError:
            return False, 0.0, text

    for said in turns.values():
        if "order" in columns:
            said.sort(key=order)
    return {p: ("", {"messages": turns[dialogue(p, row)]}) for p, (_, row) in rows.items()}


def _made_of(
    found: tuple[str, dict[str, Any]], row_id: str, shape: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The row of this id among those that a source row becomes."""
    raw_id, row = found
    if shape["format"] == "turns":
        return row
    made = _reshaped(row, shape)
    return next((m for i, m in enumerate(made) if derived_row_id(raw_id, i, len(made)) == row_id), None)


def _reshaped(row: dict[str, Any], shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: Any = [row]
    if shape["transform"]:
        rows = import_function("transform", shape["transform"])(row)
        rows = rows if isinstance(rows, list) else [rows]
    for each in rows:
        texts = {
            name: _BRACES.sub(lambda m: m[0][0] if m[1] is None else str(_at(each, m[1])), text)  # noqa: B023
            for name, text in shape["text"].items()
        }
        each.update(texts)
    return list(rows)


def _at(row: Mapping[str, Any], column: str) -> Any:
    """A column by its name, else by a dotted path."""
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        else:
            value = value[int(key)] if isinstance(value, list) and key.isdecimal() else None
    return value


def source_conversation(
    row: Mapping[str, Any],
    shape: Mapping[str, Any],
    contract: Mapping[str, Any],
    roles: Sequence[str],
    template: ChatTemplate,
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools) of a source row, as a client would send them to a server.

    Args:
        shape, contract: As the dataset file has them.
        roles: Of the normalized row's messages; where there are more or fewer here, roles are missing.
    """
    columns = shape["columns"]
    format_ = "messages" if shape["format"] == "turns" else shape["format"]

    def field(name: str) -> Any:
        return _at(row, columns.get(name, name))

    def turns(value: Any, side: str = "") -> list[dict[str, Any]]:
        if isinstance(value, list):
            return [_message(t, columns, template) for t in value]
        return [{"content": value, "said_by": side}]

    def below(*names: str) -> str:
        texts = [t for t in map(field, names) if isinstance(t, str) and t.strip()]
        return f"\n\n{template.input_heading or ''}".join(texts)

    system = field("system_prompt" if format_ == "question_response" else "system")
    if format_ in ("messages", "sharegpt"):
        messages = turns(field("messages" if format_ == "messages" else "conversations"))
    elif format_ == "prompt_completion":
        messages = turns(field("prompt"), "user") + turns(field("completion"), "assistant")
    elif format_ == "instruction":
        earlier = [{"content": text} for pair in field("history") or () for text in pair]
        messages = [*earlier, {"content": below("instruction", "input")}, {"content": field("output")}]
    elif format_ == "dolly":
        messages, system = (
            [{"content": below("instruction", "context")}, {"content": field("response")}],
            None,
        )
    else:
        messages = [{"content": field("question")}, {"content": field("response")}]
    if isinstance(system, str) and system.strip() and not any(m.get("is_system") for m in messages):
        messages.insert(0, {"content": system, "said_by": "system"})
    messages = [
        m for m in messages if not (m.pop("is_system", False) and not (m["content"] or "").strip() and system)
    ]
    for name in _REASONING:
        if (
            format_ not in ("messages", "sharegpt")
            and isinstance(reasoning := field(name), str)
            and reasoning
        ):
            messages[-1][template.reasoning_field] = reasoning
    rules = ("merge_consecutive", "drop_leading_assistant", "trim_trailing_user")
    if any(contract[rule] for rule in rules) and all("said_by" in m for m in messages):
        messages = _arranged(messages, contract, shape["roles"])
    for message, role in zip(messages, roles, strict=False):
        message.pop("said_by", None)
        message["role"] = role
    tools = field("tools") if field("tools") not in _EMPTY else field("functions")
    return messages, _tools(tools)


def _message(turn: Mapping[str, Any], columns: Mapping[str, str], template: ChatTemplate) -> dict[str, Any]:
    names = [columns.get(n, n) for n in ("role", "content", "from", "value")]
    message = {k: v for k, v in turn.items() if k not in (*_NOT_FOR_TEMPLATES, *names) and v is not None}
    role = turn.get(names[0], turn.get(names[2]))
    content = next((turn[n] for n in (names[1], names[3]) if turn.get(n) not in (None, "")), "")
    calls = turn.get("tool_calls") or turn.get("function_call") or []
    if isinstance(content, list):
        texts = [p if isinstance(p, str) else p.get("text", p.get("value", "")) for p in content]
        thoughts = [p.get("thinking", "") for p in content if isinstance(p, Mapping)]
        content = "".join(texts)
        if "".join(thoughts):
            message["reasoning_content"] = "".join(thoughts)
    if role in ("function_call", "tool_call"):
        calls, content = content, ""
    message["content"] = content
    reasoning = next((message.pop(n) for n in _REASONING if message.get(n)), None)
    if reasoning:
        message[template.reasoning_field] = reasoning
    calls = literal_json.loads(calls) if isinstance(calls, str) else calls
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_call(c, template) for c in (calls if isinstance(calls, list) else [calls])]
    if role in ("system", "developer"):
        message["is_system"] = True
    message["said_by"] = role
    return message


def _arranged(
    messages: list[dict[str, Any]], contract: Mapping[str, Any], own_roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The turns that are left where the contract has some merged, or left out at an end."""

    def side(message: Mapping[str, Any]) -> str:
        said = str(message.get("said_by"))
        said = own_roles.get(said, said.lower())
        return next((side for side, names in _SIDES.items() if said in names), said)

    if contract["merge_consecutive"]:
        merged: list[dict[str, Any]] = []
        for message in messages:
            pair = [*merged[-1:], message]
            plain = not any(m.get(name) for m in pair for name in _MORE_THAN_TEXT)
            if len(pair) == 2 and plain and side(pair[0]) == side(message) != "tool":
                merged[-1]["content"] += "\n" + message["content"]
            else:
                merged.append(message)
        messages = merged
    if contract["drop_leading_assistant"]:
        first = next((i for i, m in enumerate(messages) if side(m) == "user"), 0)
        messages = [m for m in messages[:first] if side(m) == "system"] + messages[first:]
    if contract["trim_trailing_user"]:
        while messages and side(messages[-1]) != "assistant":
            messages = messages[:-1]
    return messages


def _call(call: Any, template: ChatTemplate) -> dict[str, Any]:
    call = literal_json.loads(call) if isinstance(call, str) else call
    call = call if isinstance(call.get("function"), Mapping) else {"type": "function", "function": call}
    function = dict(call["function"])
    arguments = function.get("arguments", function.pop("parameters", None))
    if arguments in (None, "", "null"):
        arguments = {}
    if isinstance(arguments, str) and not template.takes_text_arguments:
        arguments = literal_json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value:
        value = literal_json.loads(value)
    if value in _EMPTY:
        return None
    tools = [
        literal_json.loads(t) if isinstance(t, str) else t
        for t in (value if isinstance(value, list) else [value])
    ]
    return [
        t if isinstance(t.get("function"), Mapping) else {"type": "function", "function": t} for t in tools
    ]


_ROLES = pa.array(["system", "user", "assistant", "tool"])
_FIELDS = ("content", "reasoning_content", "tool_calls", "name", "tool_call_id")


def shapes_of(rows: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    """uint64 (rows,): equal for rows with the same roles, the same fields present, and tools or none."""
    messages = rows.column("messages")
    flat = messages.flatten()
    starts = messages.offsets.to_numpy().astype(np.int64)
    starts -= starts[0] if len(starts) else 0
    codes = pc.fill_null(pc.index_in(flat.field("role"), _ROLES), len(_ROLES)).to_numpy().astype(np.uint64)
    for name in _FIELDS:
        present = pc.not_equal(pc.fill_null(flat.field(name), ""), "").to_numpy(zero_copy_only=False)
        codes = 2 * codes + present
    codes = 2 * codes + flat.field("input_at").is_valid().to_numpy(zero_copy_only=False)
    position = np.arange(len(codes)) - np.repeat(starts[:-1], np.diff(starts))
    each = _mixed(codes * np.uint64(1 << 20) + position.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(each, dtype=np.uint64)])
    tools = rows.column("tools").is_valid().to_numpy(zero_copy_only=False)
    return _mixed(sums[starts[1:]] - sums[starts[:-1]] + tools.astype(np.uint64))


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64: http://xoshiro.di.unimi.it/splitmix64.c"""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

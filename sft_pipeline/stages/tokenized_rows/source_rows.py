"""The conversation that a source row holds, taken from the row as it was written.

This is what the tokens are compared with, so it shares no code with the formats of validated_rows: whatever
those lose, this still has. Only the roles' names are taken from the normalized row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.store import Artifact
from sft_pipeline.tables import literal_json
from sft_pipeline.tables.parquet import read_batches
from sft_pipeline.text.template import ChatTemplate

Place = tuple[int, str, int]  # source, file, line

_NOT_FOR_TEMPLATES = ("from", "value", "weight", "loss", "loss_weight", "train", "function_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "null", "[]")


def ancestor(artifact: Artifact, name: str) -> Artifact:
    """The artifact of an earlier stage from which this one was made; it lies beside it."""
    return Artifact(artifact.path.parent / artifact.manifest.inputs[name].fingerprint)


def read_sources(raw: Artifact, wanted: Mapping[Place, str]) -> dict[Place, dict[str, Any]]:
    """The rows at these places, as they were written.

    Args:
        raw: raw_rows.
        wanted: Row id of each place.
    """
    found: dict[Place, dict[str, Any]] = {}
    ids = pa.array(sorted(set(wanted.values())), pa.string())
    for batch in read_batches(raw.parts("rows"), ["row_id", "source", "file", "line", "content"]):
        for row in batch.filter(pc.is_in(batch.column("row_id"), ids)).to_pylist():
            place = (row["source"], row["file"], row["line"])
            if wanted.get(place) == row["row_id"]:
                found[place] = literal_json.loads(row["content"])
        if len(found) == len(wanted):
            break
    return found


def source_conversation(
    row: Mapping[str, Any],
    format_: str,
    columns: Mapping[str, str],
    roles: Sequence[str],
    template: ChatTemplate,
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """(messages, tools) of a source row, as a client would send them to a server.

    Args:
        format_, columns: As the dataset file has them.
        roles: Of the normalized row's messages; where there are more or fewer here, roles are missing.
    """

    def field(name: str) -> Any:
        value: Any = row
        column = columns.get(name, name)
        for key in [column] if column in row else column.split("."):
            if isinstance(value, Mapping):
                value = value.get(key)
            else:
                value = value[int(key)] if isinstance(value, list) and key.isdecimal() else None
        return value

    def turns(value: Any) -> list[dict[str, Any]]:
        return (
            [_message(t, columns, template) for t in value]
            if isinstance(value, list)
            else [{"content": value}]
        )

    def below(*names: str) -> str:
        texts = [t for t in map(field, names) if isinstance(t, str) and t.strip()]
        return f"\n\n{template.input_heading or ''}".join(texts)

    system = field("system_prompt" if format_ == "question_response" else "system")
    if format_ in ("messages", "sharegpt"):
        messages = turns(field("messages" if format_ == "messages" else "conversations"))
    elif format_ == "prompt_completion":
        messages = turns(field("prompt")) + turns(field("completion"))
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
        messages.insert(0, {"content": system})
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
    for message, role in zip(messages, roles, strict=False):
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
        texts = [p if isinstance(p, str) else p.get("text", "") for p in content]
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
    return message


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

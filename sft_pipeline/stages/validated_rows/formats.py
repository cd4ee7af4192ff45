"""The known row formats, each turned into one list of messages.

A message is a dict of role (system, user, assistant, tool), content (text), weight (loss weight or None) and
tool_calls (JSON text or None). A function here reads a raw row and reports what is wrong with its shape;
whether the conversation keeps the contract is checked in `validate.py`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import MESSAGE

MISSING: Any = object()

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = ("function_call", "tool_call")
WEIGHT_KEYS = ("weight", "loss_weight", "loss")
MESSAGE_FIELDS = tuple(field.name for field in MESSAGE)
LARGEST_WEIGHT = 3.4e38  # of a 32-bit float

Message = dict[str, Any]


class NormalizedRow:
    """A row's messages, tools and reasons. A message whose content is None has a reason already."""

    __slots__ = ("messages", "reasons", "tools")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.tools: str | None = None
        self.reasons: list[RejectReason] = []

    def reject(self, reason: RejectReason) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)

    def add(
        self, role: str, content: str | None, weight: float | None = None, tool_calls: str | None = None
    ) -> None:
        message = dict.fromkeys(MESSAGE_FIELDS)
        message |= {"role": role, "content": content, "weight": weight, "tool_calls": tool_calls}
        self.messages.append(message)


class MappedFields:
    """A raw row read through a column mapping."""

    __slots__ = ("_columns", "_row")

    def __init__(self, row: dict[str, Any], columns: Mapping[str, str]) -> None:
        self._row, self._columns = row, columns

    def get(self, name: str) -> Any:
        """The value of a field, or MISSING."""
        column = self._columns.get(name, name)
        return self._row[column] if column in self._row else look_up(self._row, column)

    def inner(self, message: dict[str, Any], *names: str) -> Any:
        """The value of the first of the names that a message has (mapped ones first), or MISSING."""
        for name in names:
            if (value := message.get(self._columns.get(name, name), MISSING)) is not MISSING:
                return value
        return MISSING


def look_up(row: dict[str, Any], column: str) -> Any:
    """A column by its name, else by a dotted path; MISSING where there is neither."""
    if column in row:
        return row[column]
    if "." not in column:
        return MISSING
    value: Any = row
    for key in column.split("."):
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def normalize(format_: str, row: dict[str, Any], columns: Mapping[str, str]) -> NormalizedRow:
    """The conversation in a raw row of the given format."""
    normalized = NormalizedRow()
    fields = MappedFields(row, columns)
    FORMATS[format_](fields, normalized)
    normalized.tools = _tools(fields, normalized)
    return normalized


# -- formats ---------------------------------------------------------------------------------------


def _messages(fields: MappedFields, to: NormalizedRow) -> None:
    """messages: [{role, content, weight?, tool_calls?}]; `system` beside it is put first."""
    _turns_of(fields, to, "messages")


def _sharegpt(fields: MappedFields, to: NormalizedRow) -> None:
    """conversations: [{from, value}]; `system` beside it is put first."""
    _turns_of(fields, to, "conversations")


def _turns_of(fields: MappedFields, to: NormalizedRow, name: str) -> None:
    turns = fields.get(name)
    if not isinstance(turns, list):
        to.reject(
            RejectReason.MISSING_FIELD if turns is MISSING or turns is None else RejectReason.WRONG_TYPE
        )
        return
    _turns(fields, to, turns)
    _put_system_first(fields, to, "system")


def _prompt_completion(fields: MappedFields, to: NormalizedRow) -> None:
    """prompt and completion, each text or a list of messages; `system` beside them is put first."""
    for value, role in ((fields.get("prompt"), "user"), (fields.get("completion"), "assistant")):
        if isinstance(value, list):
            _turns(fields, to, value)
        else:
            to.add(role, _text(value, to))
    _put_system_first(fields, to, "system")


def _instruction(fields: MappedFields, to: NormalizedRow) -> None:
    """Alpaca: instruction, optional input below it, output; `history` holds earlier [prompt, reply] pairs."""
    _put_system_first(fields, to, "system")
    history = fields.get("history")
    if history is not MISSING and history is not None:
        if not isinstance(history, list) or not all(isinstance(t, list) and len(t) == 2 for t in history):
            to.reject(RejectReason.WRONG_TYPE)
        else:
            for prompt, reply in history:
                to.add("user", _text(prompt, to))
                to.add("assistant", _text(reply, to))
    to.add("user", _joined(_text(fields.get("instruction"), to), _optional(fields.get("input"), to)))
    to.add("assistant", _text(fields.get("output"), to))


def _dolly(fields: MappedFields, to: NormalizedRow) -> None:
    """instruction, optional context below it, response."""
    to.add("user", _joined(_text(fields.get("instruction"), to), _optional(fields.get("context"), to)))
    to.add("assistant", _text(fields.get("response"), to))


def _question_response(fields: MappedFields, to: NormalizedRow) -> None:
    """OpenOrca: optional system_prompt, question, response."""
    _put_system_first(fields, to, "system_prompt")
    to.add("user", _text(fields.get("question"), to))
    to.add("assistant", _text(fields.get("response"), to))


FORMATS: dict[str, Callable[[MappedFields, NormalizedRow], None]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "dolly": _dolly,
    "question_response": _question_response,
}


# -- values ----------------------------------------------------------------------------------------


def _text(value: Any, to: NormalizedRow) -> str | None:
    """Required text. Null is the empty text, which the contract rejects."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    to.reject(RejectReason.MISSING_FIELD if value is MISSING else RejectReason.WRONG_TYPE)
    return None


def _optional(value: Any, to: NormalizedRow) -> str:
    return "" if value is MISSING else _text(value, to) or ""


def _joined(first: str | None, second: str) -> str | None:
    """The second text below the first, where neither is blank."""
    if first is None:
        return None
    return "\n\n".join(text for text in (first, second) if text.strip())


def _put_system_first(fields: MappedFields, to: NormalizedRow, name: str) -> None:
    """The system message that stands beside the turns, unless one stands among them."""
    value = fields.get(name)
    if value is MISSING or any(m["role"] == "system" for m in to.messages):
        return
    if (system := _optional(value, to)).strip():
        to.messages.insert(0, {**dict.fromkeys(MESSAGE_FIELDS), "role": "system", "content": system})


def _turns(fields: MappedFields, to: NormalizedRow, turns: list[Any]) -> None:
    for turn in turns:
        if not isinstance(turn, dict):
            to.reject(RejectReason.WRONG_TYPE)
            to.add("", None)
            continue
        name = fields.inner(turn, "role", "from")
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            to.reject(RejectReason.MISSING_FIELD if name is MISSING else RejectReason.ILLEGAL_ROLE)
        content, calls = _content(fields.inner(turn, "content", "value"), to)
        given = turn.get("tool_calls")
        if given:
            calls = [*calls, *given] if isinstance(given, list) else [*calls, given]
        if name is not MISSING and role == "assistant" and name.lower() in CALL_ROLES:
            calls, content = [*calls, content], ""
        if calls and content is None:
            content = ""
        tool_calls = _tool_calls(calls, to) if calls else None
        to.add(role or "", content if tool_calls or not calls else None, _weight(turn, to), tool_calls)


def _content(value: Any, to: NormalizedRow) -> tuple[str | None, list[Any]]:
    """The text of a message, and tool calls that stand among its parts."""
    if value is MISSING:
        value = None
    if not isinstance(value, list):
        return _text(value, to), []
    texts, calls = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        inner = part.get("text", part.get("value")) if isinstance(part, dict) else part
        if kind in ("tool_call", "function_call"):
            calls.append(inner)
        elif kind not in (None, "text") or not isinstance(inner, str):
            to.reject(RejectReason.UNSUPPORTED_CONTENT)
            return None, []
        else:
            texts.append(inner)
    return "".join(texts), calls


def _weight(turn: dict[str, Any], to: NormalizedRow) -> float | None:
    """The loss weight of a message; `loss: false` is weight 0."""
    for key in WEIGHT_KEYS:
        if (value := turn.get(key)) is not None:
            # A bool is an int: `loss: true` is weight 1.
            if isinstance(value, int | float) and 0 <= value <= LARGEST_WEIGHT:
                return float(value)
            to.reject(RejectReason.WRONG_TYPE)
    return None


def _parsed(value: Any) -> Any:
    """JSON that may be given as text; None where it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _compact(value: Any, otherwise: RejectReason, to: NormalizedRow) -> str | None:
    """JSON text. What comes from JSON in JSON may hold half a surrogate pair, or be too deep to write."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        text.encode()
    except (UnicodeEncodeError, RecursionError):
        to.reject(otherwise)
        return None
    return text


def _tool_calls(calls: list[Any], to: NormalizedRow) -> str | None:
    """Calls in the common form [{type: function, function: {name, arguments}}], as JSON text."""
    found: list[dict[str, Any]] = []
    for given in calls:
        parsed = _parsed(given)  # many datasets give calls as JSON text, and arguments as JSON text within it
        for call in parsed if isinstance(parsed, list) else [parsed]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                to.reject(RejectReason.INVALID_TOOL_CALL)
                return None
            arguments = _parsed(function.get("arguments", function.get("parameters", {})))
            if not isinstance(arguments, dict):
                to.reject(RejectReason.INVALID_TOOL_CALL)
                return None
            entry: dict[str, Any] = {
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
            if isinstance(call.get("id"), str):
                entry["id"] = call["id"]
            found.append(entry)
    return _compact(found, RejectReason.INVALID_TOOL_CALL, to)


def _tools(fields: MappedFields, to: NormalizedRow) -> str | None:
    """The tools that the row declares, in the common form, as JSON text; None where there are none."""
    value = fields.get("tools")
    if value is MISSING or value is None or value in ("", [], "[]"):
        return None
    parsed = _parsed(value)
    if not isinstance(parsed, list) or not all(isinstance(tool, dict) for tool in parsed):
        to.reject(RejectReason.INVALID_TOOLS)
        return None
    declared = [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed]
    return _compact(declared, RejectReason.INVALID_TOOLS, to)

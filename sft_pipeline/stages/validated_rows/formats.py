"""The known row formats, each turned into one list of messages.

A message is a dict with the fields of `MESSAGE`. A function here reads a raw row and reports what is wrong
with its shape; whether the conversation keeps the contract is checked in `validate.py`.

No field is lost unseen: `unknown_fields.py` looks at the keys that nothing here reads.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sft_pipeline.row_conditions import column_value
from sft_pipeline.stages.validated_rows.normalized_row import EMPTY_MESSAGE, MISSING, NO_VALUE, NormalizedRow
from sft_pipeline.stages.validated_rows.tools import tool_calls_of, tools_of
from sft_pipeline.tables.reasons import RejectReason

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
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "loss_weight", "loss", "train")
SMALLEST_WEIGHT, LARGEST_WEIGHT = 0.001, 1_000.0  # of a message; 0 masks it


LONGEST_ROLE = 60  # characters shown

_MORE = frozenset({"tools", "functions", *REASONING})


class MappedFields:
    """A raw row read through a column mapping.

    Attributes:
        has_more: Whether there may be tools or reasoning beside the messages; most rows have neither.
        roles: The source's own role names.
    """

    __slots__ = ("_columns", "_row", "has_more", "roles")

    def __init__(
        self, row: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, str] | None = None
    ) -> None:
        self._row, self._columns, self.roles = row, columns, roles or {}
        self.has_more = bool(columns) or not _MORE.isdisjoint(row)

    def get(self, name: str) -> Any:
        """The value of a field, or MISSING."""
        column = self._columns.get(name, name)
        return self._row[column] if column in self._row else look_up(self._row, column)

    def inner(self, message: dict[str, Any], *names: str) -> Any:
        """The first value that a message has under one of the names (mapped ones first) and that is not
        empty; else the first; else MISSING."""
        found = MISSING
        for name in names:
            value = message.get(self._columns.get(name, name), MISSING)
            if value is not MISSING and value is not None and value != "":
                return value
            if found is MISSING:
                found = value
        return found


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """A column by its name, else by a dotted path; MISSING where there is neither."""
    return column_value(row, column, MISSING)


def normalize(
    format_: str, row: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, str] | None = None
) -> NormalizedRow:
    """The conversation in a raw row of the given format."""
    normalized = NormalizedRow()
    fields = MappedFields(row, columns, roles)
    FORMATS[format_](fields, normalized)
    if fields.has_more:
        normalized.tools = tools_of(fields.get("tools"), fields.get("functions"), normalized)
    return normalized


# -- formats ---------------------------------------------------------------------------------------


def _messages(fields: MappedFields, to: NormalizedRow) -> None:
    """messages: [{role, content, reasoning_content?, tool_calls?, name?, tool_call_id?, weight?}]; `system`
    beside it is put first."""
    _turns_of(fields, to, "messages")


def _sharegpt(fields: MappedFields, to: NormalizedRow) -> None:
    """conversations: [{from, value}]; `system` beside it is put first."""
    _turns_of(fields, to, "conversations")


def _turns_of(fields: MappedFields, to: NormalizedRow, name: str) -> None:
    turns = fields.get(name)
    if not isinstance(turns, list):
        absent = turns is MISSING or turns is None
        to.reject(RejectReason.MISSING_FIELD if absent else RejectReason.WRONG_TYPE, detail=name)
        return
    _turns(fields, to, turns)
    _put_system_first(fields, to, "system")


def _prompt_completion(fields: MappedFields, to: NormalizedRow) -> None:
    """prompt and completion, each text or a list of messages; `system` beside them is put first."""
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = fields.get(name)
        if isinstance(value, list):
            _turns(fields, to, value)
        else:
            to.add(role, _text(value, to, name))
    _reason_about_reply(fields, to)
    _put_system_first(fields, to, "system")


def _instruction(fields: MappedFields, to: NormalizedRow) -> None:
    """Alpaca: instruction, optional input below it, output; `history` holds earlier [prompt, reply] pairs."""
    _put_system_first(fields, to, "system")
    history = fields.get("history")
    if history is not MISSING and history is not None:
        if not isinstance(history, list) or not all(isinstance(t, list) and len(t) == 2 for t in history):
            to.reject(RejectReason.WRONG_TYPE, detail="history")
        else:
            for prompt, reply in history:
                to.add("user", _text(prompt, to, "history"))
                to.add("assistant", _text(reply, to, "history"))
    _ask(fields, to, "input")
    to.add("assistant", _text(fields.get("output"), to, "output"))
    _reason_about_reply(fields, to)


def _dolly(fields: MappedFields, to: NormalizedRow) -> None:
    """instruction, optional context below it, response."""
    _ask(fields, to, "context")
    to.add("assistant", _text(fields.get("response"), to, "response"))
    _reason_about_reply(fields, to)


def _question_response(fields: MappedFields, to: NormalizedRow) -> None:
    """OpenOrca: optional system_prompt, question, response."""
    _put_system_first(fields, to, "system_prompt")
    to.add("user", _text(fields.get("question"), to, "question"))
    to.add("assistant", _text(fields.get("response"), to, "response"))
    _reason_about_reply(fields, to)


FORMATS: dict[str, Callable[[MappedFields, NormalizedRow], None]] = {
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "sharegpt": _sharegpt,
    "dolly": _dolly,
    "question_response": _question_response,
}


# -- values ----------------------------------------------------------------------------------------


def _text(value: Any, to: NormalizedRow, name: str) -> str | None:
    """Required text. Null is the empty text, which the contract rejects. `name`: of the field."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    to.reject(RejectReason.MISSING_FIELD if value is MISSING else RejectReason.WRONG_TYPE, detail=name)
    return None


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", str: "text", bool: "boolean"}.get(
        type(value), "null" if value is None else "number"
    )


def _optional(value: Any, to: NormalizedRow, name: str) -> str:
    return "" if value is MISSING else _text(value, to, name) or ""


def _optional_field(value: Any, to: NormalizedRow, name: str) -> str | None:
    """Text that a message need not have: None where it is absent or empty."""
    return _optional(value, to, name) or None


def _ask(fields: MappedFields, to: NormalizedRow, name: str) -> None:
    """The user's message: the instruction and, below it, what it is about, where neither is blank."""
    instruction = _text(fields.get("instruction"), to, "instruction")
    about = _optional(fields.get(name), to, name)
    if instruction is None or not about.strip():
        to.add("user", instruction)
    elif not instruction.strip():
        to.add("user", about)
    else:
        above = f"{instruction}\n\n"
        to.add("user", above + about, input_at=len(above))


def _reason_about_reply(fields: MappedFields, to: NormalizedRow) -> None:
    """Reasoning that stands beside a prompt and its reply belongs to the reply."""
    for name in REASONING if fields.has_more else ():
        value = fields.get(name)
        if value is not MISSING and value not in NO_VALUE:
            if not to.messages or to.messages[-1]["reasoning_content"] is not None:
                to.reject(RejectReason.UNUSED_FIELD, name)
            else:
                to.messages[-1]["reasoning_content"] = _optional_field(value, to, name)


def _put_system_first(fields: MappedFields, to: NormalizedRow, name: str) -> None:
    """The system message that stands beside the turns, unless one stands among them that is not blank."""
    value = fields.get(name)
    if value is MISSING or not (system := _optional(value, to, name)).strip():
        return
    among = [m for m in to.messages if m["role"] == "system" and (m["content"] or "").strip()]
    if not among:
        to.messages = [m for m in to.messages if m["role"] != "system"]
        to.messages.insert(0, {**EMPTY_MESSAGE, "role": "system", "content": system})
    elif all(m["content"].strip() != system.strip() for m in among):
        to.reject(RejectReason.UNUSED_FIELD, name)


def _turns(fields: MappedFields, to: NormalizedRow, turns: list[Any]) -> None:
    for turn in turns:
        if not isinstance(turn, dict):
            to.reject(RejectReason.WRONG_TYPE, detail=f"a turn is {_kind(turn)}")
            to.add("", None)
            continue
        said = fields.inner(turn, "role", "from")
        role = None
        if isinstance(said, str):
            role = fields.roles.get(said)
            said = said.lower()
            role = role or ROLES.get(said)
        if role is None:
            absent = said is MISSING
            to.reject(
                RejectReason.MISSING_FIELD if absent else RejectReason.ILLEGAL_ROLE,
                detail="role" if absent else repr(said)[:LONGEST_ROLE],
            )
        value = _only(fields, to, turn, "content", "value")
        if isinstance(value, str) and len(turn) == 2 and said not in CALL_ROLES:  # most turns have no more
            to.add(role or "", value)
            continue
        parts = _Parts(value, to)
        content, calls, reasoning = parts.text, parts.calls, parts.reasoning
        for key in ("tool_calls", "function_call"):
            if (given := turn.get(key)) not in NO_VALUE:
                calls += given if isinstance(given, list) else [given]
        if role == "assistant" and said in CALL_ROLES:
            calls, content = [*calls, content], ""
        if given := _optional_field(_only(fields, to, turn, *REASONING), to, "reasoning_content"):
            reasoning = given if reasoning is None else f"{reasoning}\n{given}"
        if content is None and (calls or (reasoning and value in (MISSING, None))):
            content = ""
        tool_calls = tool_calls_of(calls, to) if calls else None
        to.add(
            role or "",
            content if tool_calls or not calls else None,
            reasoning_content=reasoning,
            tool_calls=tool_calls,
            name=_optional_field(turn.get("name", MISSING), to, "name"),
            tool_call_id=_optional_field(turn.get("tool_call_id", MISSING), to, "tool_call_id"),
            weight=_weight(turn, to),
        )


def _only(fields: MappedFields, to: NormalizedRow, turn: dict[str, Any], *names: str) -> Any:
    """The value of a field that has several names; two that say different things are refused."""
    found = fields.inner(turn, *names)
    for name in names:
        if (other := turn.get(name)) not in NO_VALUE and other != found:
            to.reject(RejectReason.UNUSED_FIELD, name)
    return found


class _Parts:
    """The content of a message: text, or a list of parts.

    Attributes:
        text: None where a part is not text; then the row has a reason.
        calls: Tool calls among the parts.
        reasoning: Of parts of the types thinking and reasoning.
    """

    def __init__(self, value: Any, to: NormalizedRow) -> None:
        self.text: str | None
        self.calls: list[Any] = []
        self.reasoning: str | None = None
        if not isinstance(value, list):
            self.text = _text(None if value is MISSING else value, to, "content")
            return
        texts, thoughts = [], []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            names = ("text", "value", kind) if isinstance(kind, str) else ("text", "value")
            inner = next((part[n] for n in names if n in part), None) if isinstance(part, dict) else part
            if kind in ("tool_call", "function_call"):
                self.calls.append(inner if inner is not None else part)
            elif kind in ("thinking", "reasoning") and isinstance(inner, str):
                thoughts.append(inner)
            elif kind in (None, "text") and isinstance(inner, str):
                texts.append(inner)
            else:
                to.reject(RejectReason.UNSUPPORTED_CONTENT, detail=str(kind or _kind(inner)))
                self.text, self.calls = None, []
                return
        self.text = "".join(texts)
        self.reasoning = "".join(thoughts) or None


def _weight(turn: dict[str, Any], to: NormalizedRow) -> float | None:
    """The loss weight of a message; `loss: false` and `train: false` are weight 0."""
    found: set[float] = set()
    for key in WEIGHT_KEYS:
        if (value := turn.get(key)) is not None:
            # A bool is an int: `loss: true` is weight 1. Weights far from 1 would overflow half precision.
            if not isinstance(value, int | float) or (
                value != 0 and not SMALLEST_WEIGHT <= value <= LARGEST_WEIGHT
            ):
                to.reject(RejectReason.WRONG_TYPE, detail=key)
                continue
            found.add(float(value))
            if len(found) > 1:  # two keys that say different things
                to.reject(RejectReason.UNUSED_FIELD, key)
    return found.pop() if found else None

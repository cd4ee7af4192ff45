"""Whether a template writes what a row says: shown by changing it, once for all rows of the same shape.

A template that has no place for tool calls renders a call as an empty turn, and one that knows no
system messages leaves them out; both without a word. So every content, call and tool, and the reasoning of
the final turn, is replaced by a mark of its own. What leaves no trace in the text is not rendered.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jinja2

from sft_pipeline.text.conversation import Conversation
from sft_pipeline.text.reasons import Reason, Rejected
from sft_pipeline.text.template import ChatTemplate

Shape = tuple[Any, ...]


class RenderedFields:
    """Knows for each shape of conversation the fields that the template leaves out.

    Args:
        ignore: Fields that it may leave out.
    """

    def __init__(self, template: ChatTemplate, ignore: Sequence[str] = ()) -> None:
        self._template, self._ignore = template, frozenset(ignore)
        self._missing: dict[Shape, tuple[str, ...]] = {}

    def check(self, given: Conversation) -> None:
        """Raises:
        Rejected: FIELD_NOT_RENDERED, with the names of the fields.
        """
        shape = _shape(given)
        missing = self._missing.get(shape)
        if missing is None:
            missing = self._missing[shape] = self._find_missing(given)
        if missing:
            raise Rejected(Reason.FIELD_NOT_RENDERED, ", ".join(missing))

    def _find_missing(self, given: Conversation) -> tuple[str, ...]:
        marked = _Marked(given)
        try:
            text = self._template.render(marked.messages, marked.tools)
            suspects = [(mark, field) for mark, field in marked.marks if mark not in text]
            missing = {field for mark, field in suspects if not self._matters(given, mark)}
        except jinja2.TemplateError:
            return ()  # it refuses the conversation, and says so when the row itself is rendered
        return tuple(sorted(missing - self._ignore))

    def _matters(self, given: Conversation, mark: str) -> bool:
        """Whether changing this alone changes the text: a template may write it in another form."""
        one = _Marked(given, only=mark)
        return self._template.render(one.messages, one.tools) != self._template.render(
            given.messages, given.tools
        )


class _Marked:
    """A conversation with marks in place of what it says.

    Args:
        only: The one mark that is put.

    Attributes:
        marks: (mark, field) of all that was replaced, also with `only`.
    """

    def __init__(self, given: Conversation, only: str | None = None) -> None:
        self.marks: list[tuple[str, str]] = []
        self._only = only
        self.messages = [self._message(m, i == given.last) for i, m in enumerate(given.messages)]
        self.tools = None if given.tools is None else [self._tool(t) for t in given.tools]

    def _mark(self, field: str, value: Any) -> Any:
        mark = f"Mark{len(self.marks)}of{field.replace('_', '')}"
        self.marks.append((mark, field))
        return mark if self._only in (None, mark) else value

    def _message(self, message: dict[str, Any], is_last: bool) -> dict[str, Any]:
        marked = dict(message)
        if (message.get("content") or "").strip():
            marked["content"] = self._mark("content", message["content"])
        if is_last and (message.get("reasoning_content") or "").strip():
            marked["reasoning_content"] = self._mark("reasoning_content", message["reasoning_content"])
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call) for call in calls]
        return marked

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        name = self._mark("tool_calls", function["name"])
        arguments = function.get("arguments")
        mark = self._mark("tool_calls", None)
        if mark is not None:
            arguments = f'{{"value": "{mark}"}}' if isinstance(arguments, str) else {"value": mark}
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _tool(self, tool: Any) -> Any:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            return tool
        return {**tool, "function": {**function, "name": self._mark("tools", function.get("name"))}}


def _shape(given: Conversation) -> Shape:
    """What rows have in common that a template treats alike: roles, and which fields there are."""
    return (*_messages(given), len(given.tools or ()))


def _messages(given: Conversation) -> Iterator[Shape]:
    for m in given.messages:
        calls = m.get("tool_calls") or ()
        kinds = tuple(isinstance(call["function"].get("arguments"), str) for call in calls)
        present = (bool((m.get(n) or "").strip()) for n in ("content", "reasoning_content", "name"))
        yield (m["role"], *present, kinds)

"""Chat templates, rendered as transformers renders them; where they come from: `find_template.py`.

https://huggingface.co/docs/transformers/chat_templating (apply_chat_template)
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sft_pipeline.store.files import sha256_json
from sft_pipeline.tables import literal_json

Message = Mapping[str, Any]

_REASONING = ("reasoning_content", "reasoning", "thinking")
_ERRORS = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)

FROZEN_CLOCK = datetime(2024, 7, 26, tzinfo=UTC)
"""The time that `strftime_now` gives: a row must not depend on the day it was rendered."""

# Unicode noncharacters: they stand for nothing in any text, and mark where {% generation %} begins and ends.
GENERATION_MARKS = _BEGIN, _END = "\ufdd0", "\ufdd1"
_WITHOUT_MARKS = str.maketrans("", "", _BEGIN + _END)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, and the special tokens it may name.

    Attributes:
        name: As the recipe has it.
        text: Jinja source.
        tool_text: The source used for rows with tools; most tokenizers have one template for both.
        variables: "bos_token" and so on.
        stop: The text that ends an assistant's turn, None where nothing does.
    """

    name: str
    text: str
    tool_text: str
    variables: Mapping[str, str]
    stop: str | None = field(default=None, compare=False)

    @property
    def sha256(self) -> str:
        return sha256_json([self.text, self.tool_text, dict(self.variables)])

    @property
    def input_heading(self) -> str | None:
        """What stands above the input of an instruction (Alpaca's form has a section for it), None for all
        templates that know messages only. A client that talks to the model writes it into the message.
        """
        return "### Input:\n" if "### Instruction:" in self.text and "### Input:" in self.text else None

    @property
    def uses_clock(self) -> bool:
        """Whether the text may depend on the day on which it is rendered."""
        return "strftime_now" in self.text + self.tool_text

    @cached_property
    def has_marks(self) -> bool:
        """Whether {% generation %} blocks in the template mark what the assistant generates."""
        return re.search(r"\{%[-+]?\s*generation\b", self.text + self.tool_text) is not None

    @cached_property
    def reasoning_field(self) -> str:
        """The name under which the template reads a message's reasoning."""
        source = self.text + self.tool_text
        read = (rf"\.{name}\b|['\"]{name}['\"]\s*(?:\]|\)|,|in\b|not in\b)" for name in _REASONING)
        return next(
            (n for n, use in zip(_REASONING, read, strict=True) if re.search(use, source)), _REASONING[0]
        )

    @cached_property
    def takes_text_arguments(self) -> bool:
        """Whether arguments of a call that are given as JSON text are written as they are.

        Found by trying. Other templates would quote them like any text, or fail; they are given the object.
        """
        text = '{"probe": "of arguments",  "n": 1.50}'
        call = {"id": "123456789", "type": "function", "function": {"name": "probe", "arguments": text}}
        result = {"role": "tool", "name": "probe", "tool_call_id": "123456789", "content": "result"}
        question = {"role": "user", "content": "question"}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        tools = [{"type": "function", "function": {"name": "probe", "parameters": {"type": "object"}}}]
        for messages in ([question, calling], [question, calling, result]):
            try:
                rendered = _compiled(self.tool_text).render(
                    messages=messages, tools=tools, documents=None, **self.variables
                )
            except (jinja2.TemplateError, *_ERRORS):
                continue
            return text in rendered and f'"{text}"' not in rendered
        return False

    @cached_property
    def environment(self) -> jinja2.Environment:
        return new_environment()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Raises:
            jinja2.TemplateError: The template refuses the conversation; the message is its own.
        """
        text = self._render(messages, tools, add_generation_prompt)
        return text.translate(_WITHOUT_MARKS) if self.has_marks else text

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and its character spans inside {% generation %} blocks."""
        text = self._render(messages, tools, False)
        if not self.has_marks:
            return text, []
        parts, spans, length, start = [], [], 0, 0
        for part in re.split(f"([{_BEGIN}{_END}])", text):
            if part == _BEGIN:
                start = length
            elif part == _END:
                spans.append((start, length))
            else:
                parts.append(part)
                length += len(part)
        return "".join(parts), spans

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool
    ) -> str:
        try:
            return _compiled(self.tool_text if tools else self.text).render(
                messages=self.as_read(messages),
                tools=list(tools) if tools else None,  # as a server passes it
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except jinja2.TemplateError:
            raise
        # What a template's own expressions raise on a conversation that they were not written for.
        except _ERRORS as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error

    def as_read(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with reasoning and arguments in the form in which the template reads them."""
        return list(map(self._as_read, messages))

    def _as_read(self, message: Message) -> Message:
        if "reasoning_content" in message and self.reasoning_field != "reasoning_content":
            message = dict(message)
            message[self.reasoning_field] = message.pop("reasoning_content")
        calls = message.get("tool_calls") or ()
        given_text = any(isinstance(call["function"].get("arguments"), str) for call in calls)
        if given_text and not self.takes_text_arguments:
            return {**message, "tool_calls": list(map(_with_object, calls))}
        return message


def rendered_length(text: str, tool_text: str, special: Any) -> Callable[[str], int]:
    """The length of what a chat template makes of a conversation (JSON); 0 where it refuses it.

    A task of `bounded_child`.
    """
    template = ChatTemplate("", text, tool_text, special)

    def length(conversation: str) -> int:
        given = json.loads(conversation)
        try:
            return len(template.render(given["messages"], given["tools"]))
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, MemoryError):
                raise error.__cause__ from None
            return 0  # what it refuses it says where it is used

    return length


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """A call with its arguments as an object."""
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    return {**call, "function": {**function, "arguments": literal_json.loads(arguments)}}


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: the text in between is kept, with a mark at either end."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return _BEGIN + caller() + _END


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, remembering what it allows, which depends only on the object's type and the name."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._safe: dict[tuple[type, str], bool] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        kind = (type(obj), attr)
        safe = self._safe.get(kind)
        if safe is None:
            safe = self._safe[kind] = super().is_safe_attribute(obj, attr, value)
        return safe


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return new_environment().from_string(source)  # Qwen3's takes 0.15 s


def new_environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControls])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = FROZEN_CLOCK.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not have. Numbers stay as the row spells them."""
    return literal_json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

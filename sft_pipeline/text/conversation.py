"""A row's messages as chat templates read them, and the control tokens that its text must not hold."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2
from jinja2 import nodes

from sft_pipeline.tables import literal_json
from sft_pipeline.text.reasons import Reason, Rejected
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer, any_of

WORD_JOINER = "\u2060"
"""Put into a literal control token to keep it text: invisible, of no width, and not white space."""
_TOKEN = re.compile(r"<\|\w+\|>")
_GAP = "\ufdd2"  # a Unicode noncharacter: it joins with nothing


@dataclass(frozen=True)
class Conversation:
    """One row as templates read it.

    Attributes:
        messages: Dicts of role and, where the row has them, content, reasoning_content, tool_calls (parsed),
            name and tool_call_id.
        weights: Per message: what a token of it counts for in the loss; 0 takes it out.
        tools: Function descriptions (parsed), or None.
        completion: The final assistant message's text, as the row has it.
        neutralised: Literal control tokens that were made plain text.
        inputs: For messages that consist of an instruction and its input, by index where the input begins.
    """

    messages: list[dict[str, Any]]
    weights: list[float]
    tools: list[Any] | None
    completion: str
    neutralised: int = 0
    inputs: Mapping[int, int] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The index of the final message."""
        return len(self.messages) - 1


def conversation(row: Mapping[str, Any], system: str | None = None) -> Conversation:
    """A row of `grouped_split` as templates read it.

    Args:
        system: A system message put before conversations that have none.

    Raises:
        Rejected: The last message is not the assistant's.
    """
    messages: list[dict[str, Any]] = []
    weights, inputs = [], {}
    for source in row["messages"]:
        if source.get("input_at") is not None:
            inputs[len(messages)] = source["input_at"]
        message = {"role": source["role"]}
        for name in ("content", "reasoning_content", "name", "tool_call_id"):
            if source.get(name) is not None:
                message[name] = source[name]
        if source.get("tool_calls"):
            message["tool_calls"] = literal_json.loads(source["tool_calls"])
        messages.append(message)
        weights.append(1.0 if source.get("weight") is None else float(source["weight"]))
    if not messages or messages[-1]["role"] != "assistant":
        raise Rejected(Reason.NO_FINAL_ASSISTANT)
    if system is not None and not any(m["role"] == "system" for m in messages):
        messages.insert(0, {"role": "system", "content": system})
        weights.insert(0, 1.0)
        inputs = {index + 1: at for index, at in inputs.items()}
    tools = literal_json.loads(row["tools"]) if row.get("tools") else None
    return Conversation(messages, weights, tools or None, messages[-1].get("content", ""), inputs=inputs)


class ForgeryGuard:
    """Finds text that a tokenizer would turn into a control token.

    In every message: the tokenizer's control tokens, and the text by which the template itself tells turns
    apart (see `turn_markers`). In messages that are not the assistant's: also the added
    tokens that the template itself writes (<think>, <tool_response>, ...), which an assistant may well write
    as text.

    Args:
        mode: "reject", or "neutralise": a word joiner is put after the first character of each, so that it
            stays text.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, mode: str) -> None:
        self.mode = mode
        self.template = template
        self._heads = {t[:i] for t in tokenizer.control for i in range(1, len(t))}
        self._tails = {t[i:] for t in tokenizer.control for i in range(1, len(t))}
        self._longest = max((len(t) for t in tokenizer.control), default=1)
        written = literal_text(template)
        markers = turn_markers(template, tokenizer)
        markers += [template.input_heading.strip()] if template.input_heading else []
        structural = {t for t in tokenizer.added if t in written} - set(tokenizer.control)
        self._control = tokenizer.control_pattern
        self._of_assistant = any_of([*tokenizer.control, *markers])
        self._of_others = any_of([*tokenizer.control, *markers, *structural])

    def check(self, given: Conversation) -> Conversation:
        """The conversation as it may be rendered, with the template's heading above the input of an
        instruction where it has one.

        Raises:
            Rejected: It holds a control token literally, and the mode is "reject".
        """
        messages = [self._message(m) for m in given.messages]
        tools, found = self._clean(given.tools, self._of_others) if given.tools else (None, 0)
        found += sum(n for _, n in messages)
        if not found:
            return _with_headings(given, self.template)
        if self.mode == "reject":
            raise Rejected(Reason.CONTROL_TOKEN_IN_TEXT, ", ".join(sorted(set(self._literals(given)))))
        cleaned = [m for m, _ in messages]
        inputs = {
            index: len(self._clean(given.messages[index]["content"][:at], self._of_others)[0])
            for index, at in given.inputs.items()
        }
        result = Conversation(cleaned, given.weights, tools, given.completion, found, inputs)
        return _with_headings(result, self.template)

    def check_joints(self, given: Conversation, text: str) -> None:
        """Looks for control tokens of which the template wrote one half and a message the other.

        Only where a message begins or ends like a part of one, the conversation is rendered a second time.

        Raises:
            Rejected: `text` has another number of control tokens when messages are set apart from it.
        """
        contents = [m.get("content", "") for m in given.messages]
        if not any(self._could_join(c) for c in contents):
            return
        apart = [{**m, "content": f"{_GAP}{c}{_GAP}"} for m, c in zip(given.messages, contents, strict=True)]
        try:
            placed = len(self._control.findall(self.template.render(apart, given.tools)))
        except jinja2.TemplateError:
            placed = -1
        if placed != len(self._control.findall(text)):
            detail = "a message and the template together spell a control token"
            raise Rejected(Reason.CONTROL_TOKEN_IN_TEXT, detail)

    def _could_join(self, content: str) -> bool:
        return any(
            content[-i:] in self._heads or content[:i] in self._tails
            for i in range(1, min(self._longest, len(content) + 1))
        )

    def _message(self, message: dict[str, Any]) -> tuple[dict[str, Any], int]:
        pattern = self._of_assistant if message["role"] == "assistant" else self._of_others
        content, found = self._clean(message.get("content"), pattern)
        out = {**message, "content": content} if found else message
        if "tool_calls" in message:
            calls, more = self._clean(message["tool_calls"], pattern)
            out, found = {**out, "tool_calls": calls}, found + more
        return out, found

    def _clean(self, value: Any, pattern: re.Pattern[str]) -> tuple[Any, int]:
        """The value with every literal control token broken by a word joiner, and how many there were."""
        if isinstance(value, str):
            return pattern.subn(lambda m: m.group()[0] + WORD_JOINER + m.group()[1:], value)
        if isinstance(value, list):
            pairs = [self._clean(v, pattern) for v in value]
            return [v for v, _ in pairs], sum(n for _, n in pairs)
        if isinstance(value, dict):
            keys = [self._clean(k, pattern) for k in value]
            values = [self._clean(v, pattern) for v in value.values()]
            cleaned = {k: v for (k, _), (v, _) in zip(keys, values, strict=True)}
            return cleaned, sum(n for _, n in keys + values)
        return value, 0

    def _literals(self, given: Conversation) -> Iterator[str]:
        for message in given.messages:
            pattern = self._of_assistant if message["role"] == "assistant" else self._of_others
            yield from pattern.findall(json.dumps({**message, "role": ""}, ensure_ascii=False))
        yield from self._of_others.findall(json.dumps(given.tools, ensure_ascii=False))


def _with_headings(given: Conversation, template: ChatTemplate) -> Conversation:
    """Puts the template's heading above the input of each instruction that has one."""
    if template.input_heading is None or not given.inputs:
        return given
    messages = list(given.messages)
    for index, at in given.inputs.items():
        content = messages[index]["content"]
        headed = content[:at] + template.input_heading + content[at:]
        messages[index] = {**messages[index], "content": headed}
    return replace(given, messages=messages, inputs={})


def turn_markers(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """Text with which the template begins or ends a message, where no control token does: "### Output:".

    Found by rendering: what stands directly before or after each content, up to the next control token. Words
    alone ("user") are no marker, since prose has them, and a control token beside them makes the turn.
    """
    contents = [f"\ufdd5{i}\ufdd5" for i in range(4)]
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    try:
        parts = re.split("\ufdd5[0-9]\ufdd5", template.render(turns))
    except jinja2.TemplateError:
        return []
    beside = {piece for part in parts for piece in _outer_pieces(tokenizer, part)}
    found = {text.strip() for text in beside}
    return sorted(t for t in found if len(t) >= 3 and not t.replace(" ", "").isalnum())


def _outer_pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """What lies before the first control token of a text, and what lies behind the last."""
    pieces = tokenizer.control_pattern.split(text)
    return [pieces[0], pieces[-1]]


def unknown_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What looks like a control token in the template's text, and is ordinary text to the tokenizer."""
    return sorted(set(_TOKEN.findall(literal_text(template))) - set(tokenizer.added))


def literal_text(template: ChatTemplate) -> str:
    """Every literal of the template's source, separated: what the template itself can write."""
    found: list[str] = []
    for text in {template.text, template.tool_text}:
        tree = template.environment.parse(text)
        found += [node.data for node in tree.find_all(nodes.TemplateData)]
        found += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(found)


def refusal(error: jinja2.TemplateError) -> Rejected:
    """A template's refusal as a rejection, in the template's own words."""
    return Rejected(Reason.TEMPLATE_ERROR, (error.message or type(error).__name__).splitlines()[0])

"""Conversations that a template renders alike: which text is whose, and where turns begin and end.

    <|im_start|>user\n{content 0}<|im_end|>\n<|im_start|>assistant\n | {content 1}<|im_end|>\n
    |--added--||----text-------||--added--|...                      ^ the prompt that a server sends ends here

A layout is found by rendering sentinels in place of the contents, and is a prediction: with other contents,
the text and every position in it shift by the contents' lengths. The prediction is tried against the template
itself, on contents that templates are known to treat specially, before it is used (`_Prediction.holds`).
Contents that hold one of the template's own string constants which change the rendering ("</think>" in
Qwen's), and white space at the ends where the template strips it, are not predicted; their rows are rendered
one by one (`find_triggers`). What such trials cannot show, the comparison of a sample of the rows does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jinja2
from jinja2 import nodes

from sft_pipeline.stages.tokenized_rows.outcomes import RowOutcome
from sft_pipeline.stages.tokenized_rows.rendering import Rendered, Span, render_row
from sft_pipeline.text.conversation import Conversation
from sft_pipeline.text.reasons import Rejected
from sft_pipeline.text.template import GENERATION_MARKS, ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer, any_of

Part = str | int
"""Text of the template, or the index of the message whose content stands here."""

# Long enough that no template holds one, with what templates and filters may treat specially in the middle.
_SENTINEL = "Sentinel{} of the layout & <its> \"quotes\" 'n' {{braces}}\n\nare replaced: {}.end"
_PROBES = (
    "x",
    "7",
    "Two words.",
    'a & <b>"c"</b> \\n {{ d }} {% e %} it\'s\n\n  indented\tand | piped',
    "é 中文 😀",
    "0123456789 " * 400 + "end",
)


# Short conversations in which a role's content is tried with the template's string constants.
_TRIED_ROLES = (
    ("user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "tool", "assistant"),
)


@dataclass(frozen=True)
class Boundary:
    """A position in the row: before segment `segment`, or inside it, behind literal text at its beginning."""

    segment: int
    literal: str = ""


@dataclass(frozen=True)
class RowLayout:
    """What all rows with these roles share.

    Attributes:
        segments: The row's text in order. A segment is an added token, or text without one; the prompt that
            a server sends and what follows never share a segment, since they are encoded apart.
        prompt: Where that prompt ends.
        final, turns, loss: (begin, end) of the final turn, of the supervised turns, and of what carries loss.
        control_tokens: How many of the segments are control tokens.
        outcome: The line of each such row in outcomes.parquet.
    """

    roles: tuple[str, ...]
    segments: tuple[tuple[Part, ...], ...]
    prompt: Boundary
    final: tuple[Boundary, Boundary]
    turns: tuple[tuple[Boundary, Boundary], ...]
    loss: tuple[tuple[Boundary, Boundary], ...]
    control_tokens: int
    outcome: RowOutcome

    @cached_property
    def text_segments(self) -> tuple[int, ...]:
        """The segments that differ from row to row."""
        return tuple(i for i, parts in enumerate(self.segments) if any(isinstance(p, int) for p in parts))


@dataclass(frozen=True)
class Triggers:
    """What in a content may change how the template renders the row.

    Attributes:
        texts: Strings; a content that holds one is not predicted.
        edges: Whether white space at a content's beginning or end does.
    """

    texts: tuple[str, ...]
    edges: bool


def find_layout(
    template: ChatTemplate, tokenizer: Tokenizer, roles: tuple[str, ...], supervise: str
) -> RowLayout | None:
    """The layout of conversations with these roles; None where there is none.

    Args:
        roles: Of all messages, the last of them "assistant".
        supervise: "completion", "assistant", "last_turn" or "all".
    """
    found = _Prediction.of(template, roles, supervise)
    if found is None or found.rendered.not_supervised:
        return None
    for shift in range(len(_PROBES)):
        if not found.holds([_PROBES[(i + shift) % len(_PROBES)] for i in range(len(roles))]):
            return None
    return _cut_into_segments(found, tokenizer)


def find_triggers(template: ChatTemplate, supervise: str) -> Triggers:
    """Tries every string constant of the template's source, and white space, as contents."""
    predictions = [p for roles in _TRIED_ROLES if (p := _Prediction.of(template, roles, supervise))]
    constants = {
        node.value
        for text in {template.text, template.tool_text}
        for node in template.environment.parse(text).find_all(nodes.Const)
        if isinstance(node.value, str) and node.value.strip()
    }

    def matters(contents: Sequence[str]) -> bool:
        return not all(p.holds([content] * len(p.roles)) for p in predictions for content in contents)

    # At both ends and inside at once, and alone: one of the two shows a startswith, endswith, in or ==.
    texts = [c for c in sorted(constants) if matters([f"{c} and {c} or\n{c}", c])]
    return Triggers((*texts, *GENERATION_MARKS), edges=matters([" x", "x ", "\n\nx\n"]))


@dataclass(frozen=True)
class _Prediction:
    """A conversation of sentinels, rendered, from which the rendering of others is predicted."""

    template: ChatTemplate
    roles: tuple[str, ...]
    supervise: str
    rendered: Rendered
    parts: tuple[Part, ...]
    ends: tuple[int, ...]  # where each sentinel ends in the rendered text
    sentinels: tuple[str, ...]

    @classmethod
    def of(cls, template: ChatTemplate, roles: tuple[str, ...], supervise: str) -> "_Prediction | None":
        """None where the template refuses the conversation, or does not render each content once in order."""
        sentinels = tuple(_SENTINEL.format(i, i) for i in range(len(roles)))
        rendered = _render(template, roles, sentinels, supervise)
        if rendered is None:
            return None
        parts: list[Part] = []
        ends, at = [], 0
        for message, sentinel in enumerate(sentinels):
            begin = rendered.text.find(sentinel, at)
            if begin < 0 or rendered.text.count(sentinel) != 1:
                return None
            parts += [rendered.text[at:begin], message]
            at = begin + len(sentinel)
            ends.append(at)
        parts.append(rendered.text[at:])
        filled = tuple(p for p in parts if p != "")
        return cls(template, roles, supervise, rendered, filled, tuple(ends), sentinels)

    def holds(self, contents: Sequence[str]) -> bool:
        """Whether the template renders these contents as predicted: the same text, the same positions."""
        r = self.rendered
        longer = [len(c) - len(s) for c, s in zip(contents, self.sentinels, strict=True)]

        def shifted(position: int) -> int:
            before = [more for end, more in zip(self.ends, longer, strict=True) if end <= position]
            return position + sum(before)

        def shifted_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
            return tuple((shifted(begin), shifted(end)) for begin, end in spans)

        expected = replace(
            r,
            text="".join(p if isinstance(p, str) else contents[p] for p in self.parts),
            prompt_end=shifted(r.prompt_end),
            final=shifted_spans([r.final])[0],
            turns=shifted_spans(r.turns),
            loss=shifted_spans(r.loss),
        )
        return expected == _render(self.template, self.roles, contents, self.supervise)


def _render(
    template: ChatTemplate, roles: Sequence[str], contents: Sequence[str], supervise: str
) -> Rendered | None:
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    given = Conversation(messages, [1.0] * len(messages), None, contents[-1])
    try:
        return render_row(template, given, supervise)
    except (Rejected, jinja2.TemplateError):
        return None


def _cut_into_segments(found: _Prediction, tokenizer: Tokenizer) -> RowLayout | None:
    """The layout of a prediction; None where a turn begins or ends in the middle of a message's text."""
    rendered, added = found.rendered, any_of(tokenizer.added)
    segments: list[tuple[Part, ...]] = []
    starts: list[int] = []  # characters of the sentinels' text before each segment
    at = 0
    begin_new = True
    for part in found.parts:
        if isinstance(part, int):
            pieces: list[Part] = [part]
        else:
            cut = rendered.prompt_end - at
            halves = [part[:cut], part[cut:]] if 0 < cut < len(part) else [part]
            pieces = [p for half in halves for p in re.split(f"({added.pattern})", half) if p]
        for piece in pieces:
            is_added = piece in tokenizer.added
            if begin_new or is_added or at == rendered.prompt_end:
                segments.append(())
                starts.append(at)
            segments[-1] += (piece,)
            begin_new = is_added
            at += len(found.sentinels[piece]) if isinstance(piece, int) else len(piece)

    def boundary(char: int) -> Boundary | None:
        if char in starts or char == at:
            return Boundary(starts.index(char) if char in starts else len(segments))
        index = max(i for i, start in enumerate(starts) if start < char)
        literal, inside = segments[index][0], char - starts[index]
        if isinstance(literal, str) and inside <= len(literal):
            return Boundary(index, literal[:inside])
        return None

    def boundaries(span: Span) -> tuple[Boundary, Boundary] | None:
        begin, end = boundary(span[0]), boundary(span[1])
        return (begin, end) if begin and end else None

    prompt, final = boundary(rendered.prompt_end), boundaries(rendered.final)
    turns = [boundaries(s) for s in rendered.turns or (rendered.final,)]
    loss = [boundaries(s) for s in rendered.loss]
    if prompt is None or prompt.literal or final is None or None in turns or None in loss:
        return None
    return RowLayout(
        found.roles,
        tuple(segments),
        prompt,
        final,
        tuple(t for t in turns if t),
        tuple(s for s in loss if s),
        sum(s[0] in tokenizer.control for s in segments),
        RowOutcome(1, None, None, *rendered.inserted, rendered.marks_agree),
    )

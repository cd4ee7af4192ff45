"""A conversation as text, with the characters that the assistant contributes marked.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    |------------------ prompt --------------------------||---- turn ----|tail

The prompt is what a server sends: the messages before the turn, with the generation prompt. The turn is what
the template emits after it, up to and including what ends the turn. What follows (a newline, often) nobody
generates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from sft_pipeline.text.conversation import Conversation, refusal
from sft_pipeline.text.reasons import Reason, Rejected
from sft_pipeline.text.template import ChatTemplate

Span = tuple[int, int]

MANY_TURNS = 24  # earlier turns, beyond which not every prompt is rendered

# A completion of this length that is in the template's own text is repeated by it, not there by chance.
_REPEATED = 12


@dataclass(frozen=True)
class Rendered:
    """One row's text.

    Attributes:
        text: All of it.
        prompt_end: Characters of the prompt that a server would send before the final turn.
        final: The final turn's characters.
        turns: The supervised turns, in order; `final` is the last of them unless its weight is 0.
        loss: The characters that carry loss: those of `turns`, or with `all` everything but weight-0
            messages.
        weights: What a token of each of them counts for in the loss: as many as `loss`, all above 0.
        inserted: What the template wrote into the final turn before and after the completion (stop excluded).
        not_supervised: Assistant turns left out, because the rendered text is not what a server would have
            seen.
        marks_agree: Whether the template's own {% generation %} marks name the same turns; None where it has
            none.
    """

    text: str
    prompt_end: int
    final: Span
    turns: tuple[Span, ...]
    loss: tuple[Span, ...]
    weights: tuple[float, ...]
    inserted: tuple[str, str] = ("", "")
    not_supervised: int = 0
    marks_agree: bool | None = None


def render_row(template: ChatTemplate, given: Conversation, supervise: str) -> Rendered:
    """Renders a row and finds its supervised characters.

    Args:
        supervise: "completion", "assistant", "last_turn" or "all".

    Raises:
        Rejected: TEMPLATE_ERROR, PROMPT_NOT_PREFIX, COMPLETION_NOT_RENDERED or NOTHING_SUPERVISED.
    """
    try:
        text, marks = template.render_marked(given.messages, given.tools)
        prompt = _prompt(template, given, given.last)
        if not text.startswith(prompt):
            raise Rejected(Reason.PROMPT_NOT_PREFIX)
        final, inserted = _final_turn(text, len(prompt), given.messages[-1], template.stop)
        of_messages, left_out = _turns(template, given, supervise, text, final)
        turns = tuple(of_messages.values())
        if supervise == "all":
            weighed = _whole_text(template, given, text, final)
        else:
            weighed = [(span, given.weights[index]) for index, span in of_messages.items()]
    except jinja2.TemplateError as error:
        raise refusal(error) from None
    if not weighed:
        raise Rejected(Reason.NOTHING_SUPERVISED)
    loss, weights = zip(*weighed, strict=True)
    agree = {_trimmed(text, t) for t in turns} <= {_trimmed(text, m) for m in marks} if marks else None
    return Rendered(text, len(prompt), final, turns, loss, weights, inserted, left_out, agree)


def _trimmed(text: str, span: Span) -> Span:
    """The span without white space at its end: marks often enclose the newline after the stop token."""
    return span[0], span[0] + len(text[slice(*span)].rstrip())


def _prompt(template: ChatTemplate, given: Conversation, index: int) -> str:
    """What a server sends to have message `index` generated."""
    return template.render(given.messages[:index], given.tools, add_generation_prompt=True)


def _turns(
    template: ChatTemplate, given: Conversation, supervise: str, text: str, final: Span
) -> tuple[dict[int, Span], int]:
    """The supervised turns by their messages' indices, in order, and how many earlier ones do not qualify.

    An earlier turn qualifies where the text begins with the prompt that a server would have sent for it, and
    its whole content follows. Templates that render earlier turns differently (without their thinking) fail
    one of the two.
    """
    found: dict[int, Span] = {}
    left_out = end = 0
    wanted = _supervised_messages(given, supervise)
    earlier = [i for i in wanted if i != given.last]
    spans = _predicted_turns(template, given, earlier, text, final[0]) if len(earlier) > MANY_TURNS else {}
    for index in wanted:
        if index == given.last:
            found[index] = final
            continue
        span = spans[index] if index in spans else _earlier_turn(template, given, index, text, final[0])
        if span is None or span[0] < end:
            left_out += 1
        else:
            found[index], end = span, span[1]
    return found, left_out


def _predicted_turns(
    template: ChatTemplate, given: Conversation, indices: Sequence[int], text: str, limit: int
) -> dict[int, Span | None]:
    """The spans of the earlier turns of a long conversation, most of them without rendering their prompts.

    Rendering the prompt of every turn is quadratic: 14 CPU seconds for 1,600 turns. Here the contents are
    located in one rendering, and the prompts of the first and last turns, and of every one whose number is a
    power of two, are rendered. Where those of turns alike (the fields of the message and its neighbours) have
    the same text between the contents, the others with that very text there have their spans in the same
    places.

    Returns:
        Those that were found this way or by rendering; none where a content is not in the text as it is.
    """
    try:
        contents = _contents(template, given, range(len(given.messages)), text)
    except Rejected:
        return {}
    filled = [i for i, m in enumerate(given.messages) if m.get("content")]
    places = dict(zip(filled, contents, strict=True))

    def between(index: int) -> tuple[str, str] | None:
        """What stands before and after the content of a message, up to its neighbours' contents."""
        if not {index - 1, index, index + 1} <= places.keys():
            return None
        before, own, after = (places[i] for i in (index - 1, index, index + 1))
        return text[before[1] : own[0]], text[own[1] : after[0]]

    found: dict[int, Span | None] = {}
    rules: dict[tuple[str, str], set[tuple[int, int] | None]] = {}
    ends = {*indices[:8], *indices[-8:], *(indices[2**n] for n in range(3, len(indices).bit_length() - 1))}
    for index in sorted(ends):
        span = found[index] = _earlier_turn(template, given, index, text, limit)
        if around := between(index):
            own = places[index]
            rule = None if span is None else (own[0] - span[0], span[1] - own[1])
            rules.setdefault(around, set()).add(rule)
    for index in indices:
        around = between(index)
        known = rules.get(around, set()) if around and _is_plain(given.messages[index]) else set()
        if index not in found and len(known) == 1 and (rule := next(iter(known))) is not None:
            found[index] = (places[index][0] - rule[0], places[index][1] + rule[1])
    return found


def _is_plain(message: dict[str, Any]) -> bool:
    return not message.get("reasoning_content") and not message.get("tool_calls")


def _supervised_messages(given: Conversation, supervise: str) -> list[int]:
    """Indices of the assistant messages to be supervised, in order."""
    assistants = [
        i for i, m in enumerate(given.messages) if m["role"] == "assistant" and given.weights[i] != 0
    ]
    if supervise == "assistant":
        return assistants
    if supervise == "last_turn":
        asked = max((i for i, m in enumerate(given.messages) if m["role"] == "user"), default=-1)
        return [i for i in assistants if i > asked]
    return [i for i in assistants if i == given.last]


def _final_turn(
    text: str, start: int, message: dict[str, Any], stop: str | None
) -> tuple[Span, tuple[str, str]]:
    """The final turn's span, and what the template wrote before and after the completion.

    Raises:
        Rejected: The completion is not in the text exactly once.
    """
    emitted = text[start:]
    content = message.get("content") or ""
    thought, begin, end = _locate_reply(emitted, message)
    if begin < 0:  # white space may be laid out anew (around a thinking block, say), but nothing may be lost
        if _squeeze(content) not in _squeeze(emitted):
            raise Rejected(Reason.COMPLETION_NOT_RENDERED)
        begin = end = max(thought, 0)
    finish = _finish(emitted, end, stop)
    if finish == 0:
        raise Rejected(Reason.COMPLETION_NOT_RENDERED, "the template emits nothing after the prompt")
    before, after = emitted[:begin], emitted[end:finish]
    after = after.removesuffix(stop) if stop else after
    if message.get("reasoning_content") or begin == end:
        before = after = ""  # the row's own, or laid out anew: not what the template wrote
    elif len(content) >= _REPEATED and (content in before or content in after):
        raise Rejected(Reason.COMPLETION_NOT_RENDERED, "the template emits the completion more than once")
    return (start, start + finish), (before, after)


def _earlier_turn(
    template: ChatTemplate, given: Conversation, index: int, text: str, limit: int
) -> Span | None:
    """An earlier turn's span, with its stop; None where it does not follow its own prompt in the text, or not
    all of it is there.

    Args:
        limit: Where the final turn begins.
    """
    prompt, message = _prompt(template, given, index), given.messages[index]
    if not text.startswith(prompt):
        return None
    start = len(prompt)
    emitted = text[start:limit]
    thought, begin, end = _locate_reply(emitted, message)
    if begin < 0 or thought < 0:
        return None
    stop = template.stop
    finish = -1 if stop is None else emitted.find(stop, end)
    if stop is not None and finish >= 0:
        turn = (start, start + finish + len(stop))
        if not emitted[end:finish].strip():
            return turn
        # Calls stand between, or the next message: then its content begins before the stop.
        if turn[1] <= _begin_of(template, given, index + 1, text):
            return turn
    # The turn ends otherwise than a reply does: where the text ends that is rendered up to its message.
    own = template.render(given.messages[: index + 1], given.tools).rstrip()
    return (start, len(own)) if text.startswith(own) and len(own) >= start + end else None


def _begin_of(template: ChatTemplate, given: Conversation, index: int, text: str) -> int:
    """Where the content of a message begins; -1 where it has none, or the text has it otherwise (quoted)."""
    try:
        found = _contents(template, given, [index], text)
    except Rejected:
        return -1
    return found[0][0] if found else -1


def _locate_reply(emitted: str, message: dict[str, Any]) -> tuple[int, int, int]:
    """(where the reasoning ends, where the content begins, where it ends); -1 for what is not there."""
    reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
    thought = _locate(emitted, reasoning)[1]
    begin, end = _locate(emitted[max(thought, 0) :], content)
    return thought, begin if begin < 0 else begin + max(thought, 0), end + max(thought, 0)


def _locate(emitted: str, content: str) -> Span:
    """Where the content is in the text, whole or stripped at its ends; (-1, -1) where it is not."""
    for candidate in (content, content.strip("\n"), content.strip()):
        begin = emitted.find(candidate)
        if begin >= 0:
            return begin, begin + len(candidate)
    return -1, -1


def _finish(emitted: str, content_end: int, stop: str | None) -> int:
    """Where the final turn ends: after its stop, or after the last visible character."""
    if stop is not None:
        found = emitted.find(stop, content_end)
        if found >= 0:
            return found + len(stop)
    return max(len(emitted.rstrip()), content_end)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _whole_text(
    template: ChatTemplate, given: Conversation, text: str, final: Span
) -> list[tuple[Span, float]]:
    """All characters that carry loss, with their weights: a message's own weight for an assistant's whole
    turn and for the content of others, 1 for the template's text; what weighs 0 is left out.
    """
    weighed = [index for index, weight in enumerate(given.weights) if weight != 1]
    others = [
        i for i in weighed if given.messages[i]["role"] != "assistant" and given.messages[i].get("content")
    ]
    spans = list(zip(_contents(template, given, others, text), others, strict=True))
    for index in weighed:
        if given.messages[index]["role"] == "assistant":
            turn = final if index == given.last else _earlier_turn(template, given, index, text, final[0])
            if turn is None and not _is_plain(given.messages[index]):
                raise Rejected(
                    Reason.COMPLETION_NOT_RENDERED,
                    f"message {index} has a weight of its own, and where its reasoning or its calls stand "
                    "cannot be told",
                )
            spans += [(s, index) for s in ([turn] if turn else _contents(template, given, [index], text))]
    found, start = [], 0
    for (begin, end), index in sorted(spans):
        if begin > start:
            found.append(((start, begin), 1.0))
        if end > max(begin, start) and given.weights[index]:
            found.append(((max(begin, start), end), given.weights[index]))
        start = max(start, end)
    if len(text) > start:
        found.append(((start, len(text)), 1.0))
    return found


def _contents(template: ChatTemplate, given: Conversation, indices: Sequence[int], text: str) -> list[Span]:
    """Where the contents of some messages stand: found by rendering marks in their places, since a short
    content may stand in a header too.

    Raises:
        Rejected: COMPLETION_NOT_RENDERED, where one of them is not in the text.
    """
    indices = [i for i in indices if given.messages[i].get("content")]
    marks = {i: f"\ufdd4{i}\ufdd4" for i in indices}
    marked = [{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(given.messages)]
    rendered = template.render(marked, given.tools)
    found, at, at_rendered = [], 0, 0
    for index in indices:
        place = rendered.find(marks[index], at_rendered)
        literal = rendered[at_rendered:place]
        content = given.messages[index]["content"]
        begin = at + len(literal)
        edges = ("\n", None)
        spelled = {
            content,
            *(strip(content, e) for strip in (str.strip, str.lstrip, str.rstrip) for e in edges),
        }
        shown = next((c for c in sorted(spelled, key=len, reverse=True) if text.startswith(c, begin)), None)
        if place < 0 or not text.startswith(literal, at) or shown is None:
            raise Rejected(
                Reason.COMPLETION_NOT_RENDERED, f"the text of message {index} is not in the rendered row"
            )
        found.append((begin, begin + len(shown)))
        at, at_rendered = begin + len(shown), place + len(marks[index])
    return found

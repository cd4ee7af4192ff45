"""Conversations that a template renders alike, prepared once: what is constant is tokenized, the rest has its place.

    <|im_start|>user\n [content 0] <|im_end|>\n<|im_start|>assistant\n || [content 1] <|im_end|>\n
    constant ids       text          constant ids                          text          constant ids

A place in the text (where the prompt ends, where a supervised turn begins) is kept as the number of segments before it
and, inside a segment, the literal text before it. So it is found for every row by adding up lengths, in bytes and in
tokens.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jinja2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.byte_level import ODD_CONTROL
from sft_pipeline.stages.tokenized_rows.outcomes import Outcome
from sft_pipeline.stages.tokenized_rows.rendering import Rendered, Span, render_row
from sft_pipeline.stages.tokenized_rows.tracing import Part, Question, Tracer, Untraceable
from sft_pipeline.text.conversation import Conversation
from sft_pipeline.text.reasons import Rejected
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer, any_of

Ints = npt.NDArray[np.int64]

ATTEMPTS = 20  # at one sequence of roles; then its rows are rendered one by one
VARIANTS = 16  # of one sequence of roles: other answers to the template's questions, another text


@dataclass(frozen=True)
class Segment:
    """Text without added tokens, or (no `parts`) a run of constant text whose ids are known.

    Attributes:
        parts: Literals and message indices, in order.
        ids: int32 bytes of a constant.
        text: A constant's text.
    """

    parts: tuple[Part, ...] = ()
    ids: bytes = b""
    text: str = ""

    @cached_property
    def messages(self) -> tuple[int, ...]:
        """Whose contents are in the text."""
        return tuple(p for p in self.parts if isinstance(p, int))

    @cached_property
    def is_plain(self) -> bool:
        """Whether its literals are."""
        literals = "".join(p for p in self.parts if isinstance(p, str))
        return literals.isascii() and not re.search(ODD_CONTROL, literals)

    def filled(self, contents: Sequence[pa.StringArray]) -> pa.StringArray:
        """The text of each row, given the contents message by message."""
        if self.parts == self.messages[:1]:
            return contents[self.messages[0]]
        return pc.binary_join_element_wise(
            *(p if isinstance(p, str) else contents[p] for p in self.parts), ""
        )


@dataclass(frozen=True)
class Place:
    """A position in the row: before segment `segment`, or inside it after the literal that it begins with.

    Attributes:
        literal: The text between the segment's beginning and the position.
        ids: Its ids as int32 bytes; the segment's ids begin with them in every row for which the position counts.
    """

    segment: int
    literal: str = ""
    ids: bytes = b""


@dataclass(frozen=True)
class Skeleton:
    """What all rows with these roles and these answers share.

    Attributes:
        roles: Of its messages.
        questions: A row belongs here if all hold for its contents.
        segments: The row's text, in order; the server's prompt and what follows never share one.
        prompt: Where the server's prompt ends.
        turns: (begin, end) of the supervised turns.
        loss: (begin, end) of what carries loss.
        control: Control tokens in the constants, in order.
        outcome: Of its rows.
    """

    roles: tuple[str, ...]
    questions: tuple[Question, ...]
    segments: tuple[Segment, ...]
    prompt: Place
    final: tuple[Place, Place]
    turns: tuple[tuple[Place, Place], ...]
    loss: tuple[tuple[Place, Place], ...]
    control: tuple[int, ...]
    outcome: Outcome

    @cached_property
    def own(self) -> tuple[Segment, ...]:
        """The segments that differ from row to row."""
        return tuple(s for s in self.segments if s.parts)

    def is_shared(self, segment: Segment) -> bool:
        """Whether many rows are likely to have the same text in a segment: a system message."""
        return any(self.roles[m] == "system" for m in segment.messages)

    def fits(self, contents: Sequence[str]) -> bool:
        """Whether a row with these contents is rendered like this."""
        for q in self.questions:
            if not q.holds(contents[q.message]):
                return False
        before, after = self.outcome.inserted_before or "", self.outcome.inserted_after or ""
        completion = contents[-1]
        # Where the template writes text of its own into the turn, the completion must not be found in that instead.
        return not (before or after) or (
            (before + completion).find(completion) == len(before) and completion not in after
        )

    def fits_all(self, contents: Sequence[pa.StringArray]) -> npt.NDArray[np.bool_]:
        """`fits` for many rows, given their contents message by message, none of them empty."""
        fits = np.ones(len(contents[-1]), dtype=bool)
        for q in self.questions:
            fits &= q.holds_for(contents[q.message])
        before, after = self.outcome.inserted_before or "", self.outcome.inserted_after or ""
        if before or after:
            # Only these completions can be found in what the template writes around them: they are in it, or go on
            # where it ends.
            lengths = pc.binary_length(contents[-1])
            open_ = pc.less_equal(lengths, max(len(before.encode()), len(after.encode())))
            for i in range(len(before)):
                open_ = pc.or_(open_, pc.starts_with(contents[-1], before[i:]))
            for row in np.flatnonzero(open_.to_numpy(zero_copy_only=False) & fits).tolist():
                fits[row] = self.fits([column[row].as_py() for column in contents])
        return fits


class Skeletons:
    """Finds or makes the skeletons of rows. May be used by several threads.

    Args:
        supervise: "completion", "assistant", "last_turn" or "all".

    Raises:
        Untraceable: No row of this template can have one.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, supervise: str) -> None:
        if template.stop is None or template.stop not in tokenizer.added:
            raise Untraceable("its turns do not end in a single added token")
        self._template, self._tokenizer, self._supervise = template, tokenizer, supervise
        self._tracer = Tracer(template)
        self._added = any_of(tokenizer.added)
        self._lock = threading.Lock()
        self._known: dict[tuple[str, ...], list[Skeleton]] = {}
        self._failed: dict[tuple[str, ...], int] = {}

    def of(self, roles: tuple[str, ...], contents: Sequence[pa.StringArray]) -> list[tuple[Skeleton, Ints]]:
        """The skeletons of rows with the same roles, and which rows each has; the others are rendered by themselves.

        Args:
            contents: Message by message, none of them empty.
        """
        found: list[tuple[Skeleton, Ints]] = []
        left = np.arange(len(contents[-1]))

        def take(skeleton: Skeleton) -> None:
            nonlocal left
            fits = skeleton.fits_all([column.take(pa.array(left)) for column in contents])
            found.append((skeleton, left[fits]))
            left = left[~fits]

        tried = 0
        while len(left):
            with self._lock:
                known = self._known.setdefault(roles, [])
                if tried == len(known):
                    if len(known) == VARIANTS or self._failed.get(roles, 0) == ATTEMPTS:
                        break
                    self._try(roles, [column[int(left[0])].as_py() for column in contents])
            if tried == len(known):  # the row is one of its own
                left = left[1:]
            else:
                take(known[tried])
                tried += 1
        return [(skeleton, rows) for skeleton, rows in found if len(rows)]

    def _try(self, roles: tuple[str, ...], contents: list[str]) -> None:
        """Makes the skeleton of a row that none of the known ones fits."""
        try:
            made = self._make(roles, contents)
        except (Untraceable, Rejected, jinja2.TemplateError):
            made = None
        if made is not None and made.fits(contents):
            self._known[roles].append(made)
        else:
            self._failed[roles] = self._failed.get(roles, 0) + 1

    def _make(self, roles: tuple[str, ...], contents: Sequence[str]) -> Skeleton | None:
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        given = Conversation(messages, [1.0] * len(messages), None, contents[-1])
        rendered = render_row(self._template, given, self._supervise)
        whole = self._tracer.trace(roles, contents, add_generation_prompt=False)
        questions = list(whole.questions)
        for begin, index in self._prompts(roles, rendered):
            before = self._tracer.trace(roles[:index], contents[:index], add_generation_prompt=True)
            questions += before.questions
            if not _begins_with(whole.parts, before.parts) or _length(before.parts, contents) != begin:
                return None
        if rendered.not_supervised or sorted(p for p in whole.parts if isinstance(p, int)) != list(
            range(len(roles))
        ):
            return None
        return _Layout(whole.parts, contents, rendered, self._added, self._tokenizer).skeleton(
            roles, tuple(dict.fromkeys(questions))
        )

    def _prompts(self, roles: tuple[str, ...], rendered: Rendered) -> list[tuple[int, int]]:
        """(where it ends, number of messages in it) of every prompt on which the supervised turns depend."""
        found = {(rendered.prompt_end, len(roles) - 1)}
        if self._supervise in ("assistant", "last_turn"):
            asked = max((i for i, r in enumerate(roles) if r == "user"), default=-1)
            mine = [
                i
                for i, r in enumerate(roles)
                if r == "assistant" and (self._supervise == "assistant" or i > asked)
            ]
            found |= {(turn[0], index) for turn, index in zip(rendered.turns, mine, strict=False)}
        return sorted(found)


def _begins_with(whole: Sequence[Part], beginning: Sequence[Part]) -> bool:
    """Whether the one text begins with the other, whatever the contents are."""
    if (
        not beginning
        or len(beginning) > len(whole)
        or list(whole[: len(beginning) - 1]) != list(beginning[:-1])
    ):
        return False
    here, there = whole[len(beginning) - 1], beginning[-1]
    return here == there or (isinstance(here, str) and isinstance(there, str) and here.startswith(there))


def _length(parts: Sequence[Part], contents: Sequence[str]) -> int:
    return sum(len(p) if isinstance(p, str) else len(contents[p]) for p in parts)


class _Layout:
    """Cuts the parts of one rendered row into segments, and finds its places among them."""

    def __init__(
        self,
        parts: Sequence[Part],
        contents: Sequence[str],
        rendered: Rendered,
        added: re.Pattern[str],
        tokenizer: Tokenizer,
    ) -> None:
        self._contents, self._rendered, self._tokenizer = contents, rendered, tokenizer
        self._segments: list[Segment] = []
        self._starts: list[int] = []  # characters of the rendered row before each segment
        self._open: list[Part] = []
        self._at = self._open_at = 0
        for part in parts:
            if isinstance(part, int):
                self._open.append(part)
                self._at += len(contents[part])
                if self._at == rendered.prompt_end:
                    self._close()
                continue
            for piece in re.split(f"({added.pattern})", part):
                self._literal(piece, piece in tokenizer.added)
        self._close()

    def _literal(self, text: str, is_added: bool) -> None:
        cut = self._rendered.prompt_end - self._at
        if 0 <= cut < len(text) and (cut or self._open):  # the prompt is encoded by itself
            if cut and is_added:
                raise Untraceable("the prompt ends within a token")
            self._literal(text[:cut], False)
            self._close()
            self._literal(text[cut:], is_added)
            return
        if is_added:
            self._close()
            ids = self._tokenizer.added[text].to_bytes(4, "little")
            self._put(Segment(ids=ids, text=text), self._at)
        elif text:
            self._open.append(text)
        self._at += len(text)
        if self._at == self._rendered.prompt_end:
            self._close()

    def _close(self) -> None:
        parts, self._open = tuple(self._open), []
        start, self._open_at = self._open_at, self._at
        if not parts:
            return
        if any(isinstance(p, int) for p in parts):
            self._put(Segment(parts), start)
        else:
            text = "".join(str(p) for p in parts)
            self._put(Segment(ids=self._ids(text), text=text), start)

    def _put(self, segment: Segment, start: int) -> None:
        self._segments.append(segment)
        self._starts.append(start)
        self._open_at = start + _length(segment.parts, self._contents) + len(segment.text)

    def _ids(self, text: str) -> bytes:
        if not text.isascii() or re.search(ODD_CONTROL, text):
            raise Untraceable("the template's own text is not plain")
        return np.array(self._tokenizer.ids(text), np.int32).tobytes()

    def skeleton(self, roles: tuple[str, ...], questions: tuple[Question, ...]) -> Skeleton:
        r = self._rendered
        control = [
            self._tokenizer.control[s.text] for s in self._segments if s.text in self._tokenizer.control
        ]
        return Skeleton(
            roles,
            questions,
            tuple(self._segments),
            self._place(r.prompt_end),
            self._places(r.final),
            tuple(map(self._places, r.turns or (r.final,))),
            tuple(map(self._places, r.loss)),
            tuple(control),
            Outcome(1, None, None, *r.inserted, r.marks_agree),
        )

    def _places(self, span: Span) -> tuple[Place, Place]:
        return self._place(span[0]), self._place(span[1])

    def _place(self, char: int) -> Place:
        """
        Raises:
            Untraceable: The position depends on the contents.
        """
        if char == self._at:
            return Place(len(self._segments))
        index = max(i for i, start in enumerate(self._starts) if start <= char)
        if self._starts[index] == char:
            return Place(index)
        segment, inside = self._segments[index], char - self._starts[index]
        literal = segment.parts[0] if segment.parts else ""
        if not isinstance(literal, str) or inside != len(literal) or not literal:
            raise Untraceable("a turn begins or ends within a text")
        return Place(index, literal, self._ids(literal))

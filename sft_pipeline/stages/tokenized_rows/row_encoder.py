"""Rows in, token ids with their mask out; a batch at a time.

    row -> conversation -> forgery guard -> text -> ids of prompt and rest -> mask, twice -> length -> decode

A row that fails anywhere is rejected with its reason; nothing is dropped without one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.mask import (
    Encoded,
    Job,
    control_tokens_match,
    decodes_to,
    tokens_by_offsets,
    tokens_by_prefix,
)
from sft_pipeline.stages.tokenized_rows.overflow import Cut, shorten_prompt, truncate_answer, windows
from sft_pipeline.stages.tokenized_rows.rendering import Rendered, Span, render_row
from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED
from sft_pipeline.text.conversation import Conversation, ForgeryGuard, conversation
from sft_pipeline.text.reasons import Reason, Rejected
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

Row: TypeAlias = Mapping[str, Any]
Ids: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        row_id: The row's; further parts of a row that was split have "/1", "/2", ... appended.
        input_ids: int32 (length,).
        labels: int32 (length,): the input id where it carries loss, else IGNORE_LABEL.
        prompt_length: Tokens of the prompt that a server would send before the final turn.
        truncated: Tokens of the row that are not in this example.
    """

    row_id: str
    group: str
    input_ids: Ids
    labels: Ids
    prompt_length: int
    truncated: int
    completion: str


@dataclass(frozen=True)
class RejectedRow:
    """A row that was rejected, and why."""

    row: Row
    reason: Reason
    detail: str


@dataclass(frozen=True)
class AcceptedRow:
    """A row that was encoded.

    Attributes:
        examples: More than one only where the row was split.
        inserted: What the template wrote into the final turn before and after the completion.
        marks_agree: Whether the template's own generation marks name the same turns; None where it has none.
        turns_not_supervised: Earlier assistant turns that are context only.
        neutralised: Whether literal control tokens were made plain text.
    """

    examples: tuple[Example, ...]
    inserted: tuple[str, str] = ("", "")
    marks_agree: bool | None = None
    turns_not_supervised: int = 0
    neutralised: bool = False


@dataclass(frozen=True)
class _Prepared:
    row: Row
    given: Conversation
    rendered: Rendered


@dataclass(frozen=True)
class _Masked:
    prepared: _Prepared
    ids: list[int]
    loss: tuple[Span, ...]
    turns: tuple[tuple[Span, Span], ...]  # (characters, tokens)
    prompt_length: int
    not_supervised: int


class RowEncoder:
    """Encodes rows of `grouped_split` under one tokenizer, template and mask.

    Args:
        system: A system message for conversations that have none.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, tokens: TokensConfig, system: str | None = None
    ) -> None:
        self.tokenizer, self.template, self.tokens, self.system = tokenizer, template, tokens, system
        self.guard = ForgeryGuard(tokenizer, template, tokens.control_tokens)

    def encode(self, rows: Sequence[Row]) -> list[AcceptedRow | RejectedRow]:
        """One outcome per row, in order."""
        prepared = [self._try(row, self._prepare, row) for row in rows]
        encoded = self._encode([p for p in prepared if isinstance(p, _Prepared)])
        outcomes = [
            p if isinstance(p, RejectedRow) else self._try(p.row, self._finish, p, next(encoded))
            for p in prepared
        ]
        return [o if isinstance(o, RejectedRow) else _accepted(*o) for o in self._check_round_trip(outcomes)]

    def _try(self, row: Row, step: Any, *arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Rejected as why:
            return RejectedRow(row, why.reason, why.detail)

    # -- text ------------------------------------------------------------------------------------------------

    def _prepare(self, row: Row) -> _Prepared:
        given = self.guard.check(conversation(row, self.system))
        return self._render(row, given)

    def _render(self, row: Row, given: Conversation) -> _Prepared:
        rendered = render_row(self.template, given, self.tokens.supervise)
        self.guard.check_joints(given, rendered.text)
        return _Prepared(row, given, rendered)

    # -- ids and mask ----------------------------------------------------------------------------------------

    def _encode(self, prepared: Sequence[_Prepared]) -> Iterator[Encoded]:
        texts = [p.rendered.text for p in prepared]
        ends = [p.rendered.prompt_end for p in prepared]
        prompts = self.tokenizer.encode_batch([t[:e] for t, e in zip(texts, ends, strict=True)])
        rests = self.tokenizer.continue_batch(
            [t[e:] for t, e in zip(texts, ends, strict=True)], [p.ids[-1] if p.ids else -1 for p in prompts]
        )
        return iter([Encoded(self.tokenizer, p, r) for p, r in zip(prompts, rests, strict=True)])

    def _mask(self, prepared: _Prepared, encoded: Encoded) -> _Masked:
        """The supervised tokens, by both derivations."""
        if not encoded.prompt.ids:
            raise Rejected(Reason.EMPTY_PROMPT)
        if not control_tokens_match(encoded):
            raise Rejected(Reason.CONTROL_TOKEN_MISMATCH)
        rendered = prepared.rendered
        agreed: dict[Span, Span] = {}
        dropped = 0
        for span in {*rendered.loss, *rendered.turns, rendered.final}:
            by_prefix, by_offsets = tokens_by_prefix(encoded, span), tokens_by_offsets(encoded, span)
            if by_prefix is None and span in rendered.turns and span != rendered.final:
                dropped += 1  # a token spans the boundary of an earlier turn: no server would see that prompt
            elif by_prefix is None or by_prefix != by_offsets:
                raise Rejected(
                    Reason.MASK_DISAGREEMENT,
                    f"characters {span}: tokens {by_offsets} by offsets, {by_prefix} by prefix lengths",
                )
            else:
                agreed[span] = by_prefix
        loss = tuple(agreed[s] for s in rendered.loss if s in agreed)
        turns = tuple((s, agreed[s]) for s in rendered.turns or (rendered.final,) if s in agreed)
        if not loss:
            raise Rejected(Reason.NOTHING_SUPERVISED)
        return _Masked(
            prepared, encoded.ids, loss, turns, len(encoded.prompt.ids), rendered.not_supervised + dropped
        )

    # -- length ----------------------------------------------------------------------------------------------

    def _finish(self, prepared: _Prepared, encoded: Encoded) -> tuple[_Masked, list[Cut]]:
        masked = self._mask(prepared, encoded)
        limit = self.tokens.max_length
        if len(masked.ids) <= limit:
            return masked, [Cut(0, len(masked.ids))]
        last = masked.loss[-1][1]
        if last <= limit and self.tokens.supervise != "all":
            return masked, [Cut(0, limit)]  # only some of what follows the last supervised token is lost
        policy = self.tokens.overflow
        if masked.prompt_length >= limit and policy != "truncate_prompt":
            raise Rejected(
                Reason.NO_ROOM_FOR_COMPLETION, f"prompt of {masked.prompt_length} tokens, max_length {limit}"
            )
        if policy == "truncate_answer":
            return masked, [truncate_answer(masked.loss, limit)]
        if policy == "split":
            return masked, windows(masked.loss, len(masked.ids), limit)
        if policy == "truncate_prompt":
            return self._shorten(masked)
        raise Rejected(Reason.TOO_LONG, f"{len(masked.ids)} tokens, max_length {limit}")

    def _shorten(self, masked: _Masked) -> tuple[_Masked, list[Cut]]:
        """The row with a shorter prompt, rendered anew: as a server would send that shorter conversation."""
        whole, limit = len(masked.ids), self.tokens.max_length
        while (excess := masked.loss[-1][1] - limit) > 0:
            given = shorten_prompt(masked.prepared.given, self.tokenizer, excess)
            if given is None:
                raise Rejected(
                    Reason.NO_ROOM_FOR_COMPLETION,
                    f"the completion alone does not fit into max_length {limit}",
                )
            prepared = self._render(masked.prepared.row, given)
            masked = self._mask(prepared, next(self._encode([prepared])))
        end = min(len(masked.ids), limit)
        return masked, [Cut(0, end, dropped_before=max(whole - len(masked.ids), 1))]

    # -- proof and result ------------------------------------------------------------------------------------

    def _check_round_trip(self, outcomes: list[Any]) -> list[Any]:
        """Decodes every supervised turn and compares it with the text the template emitted."""
        jobs: list[tuple[int, Job]] = []
        for index, outcome in enumerate(outcomes):
            if not isinstance(outcome, RejectedRow):
                masked = outcome[0]
                jobs += [
                    (index, (masked.ids, span, masked.prepared.rendered.text[slice(*turn)]))
                    for turn, span in masked.turns
                ]
        wrong = decodes_to(self.tokenizer, [job for _, job in jobs])
        bad = {index: detail for (index, _), detail in zip(jobs, wrong, strict=True) if detail is not None}
        return [
            o
            if isinstance(o, RejectedRow)
            else RejectedRow(o[0].prepared.row, Reason.DECODE_MISMATCH, bad[i])
            if i in bad
            else o
            for i, o in enumerate(outcomes)
        ]


def _accepted(masked: _Masked, cuts: Sequence[Cut]) -> AcceptedRow | RejectedRow:
    prepared = masked.prepared
    examples = tuple(_example(masked, cut, part) for part, cut in enumerate(cuts))
    if not all((e.labels != IGNORE_LABEL).any() for e in examples):  # only position 0 was left to supervise
        return RejectedRow(prepared.row, Reason.NOTHING_SUPERVISED, "no supervised token is left")
    return AcceptedRow(
        examples,
        prepared.rendered.inserted,
        prepared.rendered.marks_agree,
        masked.not_supervised,
        prepared.given.neutralised > 0,
    )


def _example(masked: _Masked, cut: Cut, part: int) -> Example:
    row = masked.prepared.row
    ids = np.asarray(masked.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE_LABEL, dtype=np.int32)
    for start, stop in masked.loss:
        labels[start:stop] = ids[start:stop]
    labels = labels[cut.start : cut.stop].copy()
    labels[: max(cut.new_from - cut.start, 1)] = (
        IGNORE_LABEL  # position 0 is never predicted; overlap is learnt once
    )
    supervised_lost = masked.loss[-1][1] > cut.stop
    return Example(
        row_id=row["row_id"] if part == 0 else f"{row['row_id']}/{part}",
        group=row["group"],
        input_ids=ids[cut.start : cut.stop],
        labels=labels,
        prompt_length=min(max(masked.prompt_length - cut.start, 0), cut.stop - cut.start),
        truncated=cut.dropped_before + (len(ids) - cut.stop if supervised_lost else 0),
        completion=masked.prepared.given.completion,
    )


def to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as one Arrow batch of the schema `TOKENIZED`."""
    lengths = np.array([len(e.input_ids) for e in examples], dtype=np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = [
        pa.array([e.row_id for e in examples], pa.string()),
        pa.array([e.group for e in examples], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(_flat(e.input_ids for e in examples))),
        pa.ListArray.from_arrays(offsets, pa.array(_flat(e.labels for e in examples))),
        pa.array(lengths),
        pa.array(np.array([np.count_nonzero(e.labels != IGNORE_LABEL) for e in examples], dtype=np.int32)),
        pa.array(np.array([e.prompt_length for e in examples], dtype=np.int32)),
        pa.array(np.array([e.truncated for e in examples], dtype=np.int32)),
        pa.array([e.completion for e in examples], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=TOKENIZED)


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    found = list(arrays)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int32)

"""The reference encoder: rows in, token ids with their mask out; a batch at a time.

    row -> conversation -> forgery guard -> text -> ids of prompt and rest -> mask, twice -> length -> decode

A row that fails anywhere is rejected with its reason; nothing is dropped without one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.mask import (
    EncodedRow,
    control_tokens_match,
    decoding_errors,
    tokens_by_offsets,
    tokens_by_prefix,
)
from sft_pipeline.stages.tokenized_rows.overflow import Cut, shorten_prompt, windows
from sft_pipeline.stages.tokenized_rows.rendered_fields import RenderedFields
from sft_pipeline.stages.tokenized_rows.rendering import Rendered, Span, render_row
from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED
from sft_pipeline.text.conversation import Conversation, ForgeryGuard, conversation
from sft_pipeline.text.reasons import Reason, Rejected
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

Row: TypeAlias = Mapping[str, Any]
Ids: TypeAlias = npt.NDArray[np.int32]
Weights: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        row_id: The row's; further parts of a row that was split have "/1", "/2", ... appended.
        input_ids: int32 (length,).
        labels: int32 (length,): the input id where it carries loss, else IGNORE_LABEL.
        weights: float32 (length,): what each token counts for in the loss, 0 without a label; None where
            every token with a label counts 1.
        prompt_length: Tokens of the prompt that a server would send before the final turn.
        truncated: Tokens cut off the end, where supervised ones are among them, or off the prompt; else 0.
        completion: The final assistant message, as the row has it.
    """

    row_id: str
    group: str
    input_ids: Ids
    labels: Ids
    weights: Weights | None
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
class _MaskedRow:
    """A row of any length with its supervised tokens.

    Attributes:
        loss: The token spans that carry loss.
        weights: What a token of each of them counts for.
        turns: (characters, tokens) of each supervised turn.
    """

    given: Conversation
    rendered: Rendered
    ids: list[int]
    prompt_length: int
    loss: tuple[Span, ...]
    weights: tuple[float, ...]
    turns: tuple[tuple[Span, Span], ...]
    turns_not_supervised: int


class RowEncoder:
    """Encodes rows of `grouped_split` under one tokenizer, template and mask.

    Args:
        system: A system message for conversations that have none.
        ignore: Fields that the template may leave out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        tokens: TokensConfig,
        system: str | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.template, self.tokens, self.system = tokenizer, template, tokens, system
        self.guard = ForgeryGuard(tokenizer, template, tokens.control_tokens)
        self.fields = RenderedFields(template, ignore)

    def encode(self, rows: Sequence[Row]) -> list[AcceptedRow | RejectedRow]:
        """One result per row, in order.

        Costs 0.6 to 1 ms of CPU a row of GSM8K under Qwen3: more than half of it is encoding with offsets, a
        quarter is rendering row and prompt.
        """
        results: dict[int, AcceptedRow | RejectedRow] = {}  # by index, as the following ones
        texts: dict[int, tuple[Conversation, Rendered]] = {}
        for i, row in enumerate(rows):
            try:
                given = self.guard.check(conversation(row, self.system))
                self.fields.check(given)
                texts[i] = given, self._render(given)
            except Rejected as why:
                results[i] = RejectedRow(row, why.reason, why.detail)
        # All rows at once, here and in decoding: the library encodes a batch with several threads.
        encoded = self._tokenize([rendered for _, rendered in texts.values()])
        fitted: dict[int, tuple[_MaskedRow, list[Cut]]] = {}
        for (i, (given, rendered)), encoded_row in zip(texts.items(), encoded, strict=True):
            try:
                fitted[i] = self._fit(self._mask(given, rendered, encoded_row))
            except Rejected as why:
                results[i] = RejectedRow(rows[i], why.reason, why.detail)
        turns = [
            (masked.ids, tokens, masked.rendered.text[slice(*characters)])
            for masked, _ in fitted.values()
            for characters, tokens in masked.turns
        ]
        wrong = iter(decoding_errors(self.tokenizer, turns))
        for i, (masked, cuts) in fitted.items():
            details = [d for d in islice(wrong, len(masked.turns)) if d is not None]
            if details:
                results[i] = RejectedRow(rows[i], Reason.DECODE_MISMATCH, details[-1])
            else:
                results[i] = _to_result(rows[i], masked, cuts)
        return [results[i] for i in range(len(rows))]

    def _render(self, given: Conversation) -> Rendered:
        rendered = render_row(self.template, given, self.tokens.supervise)
        self.guard.check_joints(given, rendered.text)
        return rendered

    def _tokenize(self, rendered: Sequence[Rendered]) -> list[EncodedRow]:
        """The ids of each row's prompt and, apart from it, of what follows."""
        prompts = self.tokenizer.encode_batch([r.text[: r.prompt_end] for r in rendered])
        rests = self.tokenizer.continue_batch(
            [r.text[r.prompt_end :] for r in rendered], [p.ids[-1] if p.ids else -1 for p in prompts]
        )
        return [EncodedRow(self.tokenizer, p, r) for p, r in zip(prompts, rests, strict=True)]

    def _mask(self, given: Conversation, rendered: Rendered, encoded: EncodedRow) -> _MaskedRow:
        """The supervised tokens, by both derivations.

        Raises:
            Rejected: EMPTY_PROMPT, CONTROL_TOKEN_MISMATCH, MASK_DISAGREEMENT or NOTHING_SUPERVISED.
        """
        if not encoded.prompt.ids:
            raise Rejected(Reason.EMPTY_PROMPT)
        if not control_tokens_match(encoded):
            raise Rejected(Reason.CONTROL_TOKEN_MISMATCH)
        agreed: dict[Span, Span] = {}
        dropped = 0
        for span in {*rendered.loss, *rendered.turns, rendered.final}:
            by_prefix, by_offsets = tokens_by_prefix(encoded, span), tokens_by_offsets(encoded, span)
            agree = by_prefix is not None and by_prefix == by_offsets
            if not agree and span in rendered.turns and span != rendered.final:
                dropped += 1  # a token spans the boundary of an earlier turn: no server would see that prompt
            elif by_prefix is None or not agree:
                raise Rejected(
                    Reason.MASK_DISAGREEMENT,
                    f"characters {span}: tokens {by_offsets} by offsets, {by_prefix} by prefix lengths",
                )
            else:
                agreed[span] = by_prefix
        weighed = [
            (agreed[s], w) for s, w in zip(rendered.loss, rendered.weights, strict=True) if s in agreed
        ]
        if not weighed:
            raise Rejected(Reason.NOTHING_SUPERVISED)
        loss, weights = zip(*weighed, strict=True)
        turns = tuple((s, agreed[s]) for s in rendered.turns or (rendered.final,) if s in agreed)
        left_out = rendered.not_supervised + dropped
        prompt_length = len(encoded.prompt.ids)
        return _MaskedRow(given, rendered, encoded.ids, prompt_length, loss, weights, turns, left_out)

    def _fit(self, masked: _MaskedRow) -> tuple[_MaskedRow, list[Cut]]:
        """The row, shortened where the policy for overlong rows says so, and which stretches of it are kept.

        Raises:
            Rejected: NO_ROOM_FOR_COMPLETION or TOO_LONG; with `truncate_prompt` also what rendering and
                masking raise.
        """
        policy, limit, whole = self.tokens.overflow, self.tokens.max_length, len(masked.ids)
        if whole <= limit:
            return masked, [Cut(0, whole)]
        if masked.loss[-1][1] <= limit and self.tokens.supervise != "all":
            return masked, [Cut(0, limit)]  # only some of what follows the last supervised token is lost
        windowed = policy == "split" and self.tokens.supervise != "completion"
        if masked.prompt_length >= limit and policy != "truncate_prompt" and not windowed:
            detail = f"prompt of {masked.prompt_length} tokens, max_length {limit}"
            raise Rejected(Reason.NO_ROOM_FOR_COMPLETION, detail)
        if policy == "reject":
            raise Rejected(Reason.TOO_LONG, f"{whole} tokens, max_length {limit}")
        if policy == "truncate_answer":
            if masked.loss[0][0] >= limit:  # with `all`, where every message has weight 0
                raise Rejected(Reason.NO_ROOM_FOR_COMPLETION)
            return masked, [Cut(0, limit)]
        if policy == "split":
            return masked, windows(masked.loss, whole, limit)
        # truncate_prompt: the shorter conversation is rendered and encoded anew, as a server would send it.
        while (excess := masked.loss[-1][1] - limit) > 0:
            given = shorten_prompt(masked.given, self.tokenizer, excess)
            if given is None:
                detail = f"the completion alone does not fit into max_length {limit}"
                raise Rejected(Reason.NO_ROOM_FOR_COMPLETION, detail)
            rendered = self._render(given)
            masked = self._mask(given, rendered, *self._tokenize([rendered]))
        end = min(len(masked.ids), limit)
        return masked, [Cut(0, end, dropped_before=max(whole - len(masked.ids), 1))]


def _to_result(row: Row, masked: _MaskedRow, cuts: Sequence[Cut]) -> AcceptedRow | RejectedRow:
    """One example per cut."""
    ids = np.asarray(masked.ids, dtype=np.int32)
    whole = np.full(len(ids), IGNORE_LABEL, dtype=np.int32)
    weights = np.zeros(len(ids), dtype=np.float32)
    for (start, stop), weight in zip(masked.loss, masked.weights, strict=True):
        whole[start:stop] = ids[start:stop]
        weights[start:stop] = weight
    examples = []
    for part, cut in enumerate(cuts):
        labels = whole[cut.start : cut.stop].copy()
        # Position 0 is never predicted; what overlaps with the window before is supervised there.
        labels[: max(cut.new_from - cut.start, 1)] = IGNORE_LABEL
        on = labels != IGNORE_LABEL
        if not on.any():
            return RejectedRow(row, Reason.NOTHING_SUPERVISED, "no supervised token is left")
        weighed = np.where(on, weights[cut.start : cut.stop], np.float32(0))
        supervised_lost = masked.loss[-1][1] > cut.stop
        examples.append(
            Example(
                row_id=row["row_id"] if part == 0 else f"{row['row_id']}/{part}",
                group=row["group"],
                input_ids=ids[cut.start : cut.stop],
                labels=labels,
                weights=weighed if (weighed[on] != 1).any() else None,
                prompt_length=min(max(masked.prompt_length - cut.start, 0), cut.stop - cut.start),
                truncated=cut.dropped_before + (len(ids) - cut.stop if supervised_lost else 0),
                completion=masked.given.completion,
            )
        )
    rendered, neutralised = masked.rendered, masked.given.neutralised > 0
    return AcceptedRow(
        tuple(examples), rendered.inserted, rendered.marks_agree, masked.turns_not_supervised, neutralised
    )


def to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as one Arrow batch of the schema `TOKENIZED`."""
    lengths = np.array([len(e.input_ids) for e in examples], dtype=np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    none = np.empty(0, dtype=np.int32)  # concatenate needs one array at least
    weighed = pa.array([e.weights for e in examples], TOKENIZED.field("weights").type)
    columns = [
        pa.array([e.row_id for e in examples], pa.string()),
        pa.array([e.group for e in examples], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([none, *(e.input_ids for e in examples)]))),
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([none, *(e.labels for e in examples)]))),
        weighed,
        pa.array(lengths),
        pa.array(np.array([np.count_nonzero(e.labels != IGNORE_LABEL) for e in examples], dtype=np.int32)),
        pa.array(np.array([e.prompt_length for e in examples], dtype=np.int32)),
        pa.array(np.array([e.truncated for e in examples], dtype=np.int32)),
        pa.array([e.completion for e in examples], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=TOKENIZED)

"""Many rows at once: the same examples as `RowEncoder` makes, by skeletons, pieces and array arithmetic.

    contents -> skeleton -> text segments -> ids -> (whole columns from here) mask, twice -> decode -> Arrow

Rows that this cannot do (tool calls, weights, overlong rows, templates that cannot be traced, ...) are simply not among
those that come back; `RowEncoder` does them one by one, and says what is wrong with those that have to be rejected.
"""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.encode import IGNORE
from sft_pipeline.stages.tokenized_rows.pieces import ODD_CONTROL, PieceEncoder
from sft_pipeline.stages.tokenized_rows.rows import TOKENIZED
from sft_pipeline.stages.tokenized_rows.skeleton import Place, Skeleton, Skeletons
from sft_pipeline.stages.tokenized_rows.template import ChatTemplate
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer, any_of

Ints = npt.NDArray[np.int64]

REMEMBERED = 4096  # system messages, which many rows share


@dataclass(frozen=True)
class Encoded:
    """Rows of a batch, encoded.

    Attributes:
        rows: Their indices in the batch.
        examples: One for each, in the schema TOKENIZED.
        skeletons: The skeleton of each.
        by_reference: Texts that the reference tokenizer had to encode, because they are not plain.
    """

    rows: Ints
    examples: pa.RecordBatch
    skeletons: list[Skeleton]
    by_reference: int


@dataclass
class _Group:
    """Rows of one skeleton, while they are gathered.

    Attributes:
        texts: Of the text segments, row after row.
        plain: Whether each of them is plain.
    """

    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)


class ColumnEncoder:
    """Encodes whole batches under one tokenizer, template and mask.

    Raises:
        Unsupported: The tokenizer is not one that `PieceEncoder` knows.
        Untraceable: The template cannot be traced.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, tokens: TokensConfig, system: str | None = None
    ) -> None:
        self._backend, self._tokens, self._system = tokenizer.backend, tokens, system
        self._pieces = PieceEncoder(tokenizer)
        self._skeletons = Skeletons(template, tokenizer, self._pieces, tokens.supervise)
        self._added = any_of(tokenizer.added).search
        self._first = re.compile("[" + "".join(re.escape(c) for c in sorted({t[0] for t in tokenizer.added})) + "]").search  # fmt: skip
        self._is_control = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_control[list(tokenizer.control_ids)] = True
        self._remembered: dict[str, bytes] = {}
        self._aside = ThreadPoolExecutor(1)

    def encode(self, batch: pa.RecordBatch) -> Encoded:
        """Those rows of a batch of grouped_split that can be encoded this way."""
        groups = self._gather(batch)
        parts = [self._encode_group(batch, skeleton, group) for skeleton, group in groups]
        rows = np.concatenate([np.zeros(0, np.int64), *(p.rows for p in parts)])
        examples = pa.Table.from_batches([p.examples for p in parts], TOKENIZED)
        order = np.argsort(rows, kind="stable")
        if len(parts) > 1:
            examples = examples.take(pa.array(order))
        skeletons = [s for p in parts for s in p.skeletons]
        return Encoded(
            rows[order], _one_batch(examples), [skeletons[i] for i in order], sum(p.by_reference for p in parts)
        )  # fmt: skip

    # -- text ------------------------------------------------------------------------------------------------

    def _gather(self, batch: pa.RecordBatch) -> list[tuple[Skeleton, _Group]]:
        """The rows by skeleton, with their texts."""
        messages = batch.column("messages")
        flat = messages.flatten()
        bounds = messages.offsets.to_numpy().astype(np.int64)
        bounds -= bounds[0] if len(bounds) else 0
        content = flat.field("content")
        unfit = pc.or_(
            pc.or_(pc.equal(pc.fill_null(content, ""), ""), pc.is_valid(flat.field("tool_calls"))),
            pc.equal(pc.fill_null(flat.field("weight"), 1.0), 0.0),
        )
        unfit_before = np.concatenate([[0], np.cumsum(unfit.to_numpy(zero_copy_only=False))])
        fit = (unfit_before[bounds[1:]] == unfit_before[bounds[:-1]]) & (bounds[1:] > bounds[:-1])
        fit &= batch.column("tools").is_null().to_numpy(zero_copy_only=False)
        roles, contents, plain = flat.field("role").to_pylist(), content.to_pylist(), _is_plain(content)
        groups: dict[int, tuple[Skeleton, _Group]] = {}
        spans = bounds.tolist()
        for row in np.flatnonzero(fit).tolist():
            here = slice(spans[row], spans[row + 1])
            self._put(groups, row, tuple(roles[here]), contents[here], plain[here])
        return list(groups.values())

    def _put(
        self, groups: dict[int, tuple[Skeleton, _Group]], row: int, roles: tuple[str, ...], contents: list[str], plain: list[bool],
    ) -> None:  # fmt: skip
        if self._system is not None and "system" not in roles:
            roles, contents = ("system", *roles), [self._system, *contents]
            plain = [*_is_plain(pa.array([self._system])), *plain]
        if roles[-1] != "assistant":
            return
        skeleton = self._skeletons.find(roles, contents)
        if skeleton is None:
            return
        texts = [segment.filled(contents) for segment in skeleton.own]
        for text in texts:
            if self._first(text) and self._added(text):
                return  # the text, alone or with the template's, holds an added token
        _, group = groups.setdefault(id(skeleton), (skeleton, _Group()))
        group.rows.append(row)
        group.texts += texts
        group.plain += [s.is_plain and all([plain[m] for m in s.messages]) for s in skeleton.own]

    # -- ids -------------------------------------------------------------------------------------------------

    def _ids(self, skeleton: Skeleton, group: _Group) -> tuple[list[bytes], int]:
        """The ids of every text, and how many of them the reference had to encode."""
        others = [i for i, plain in enumerate(group.plain) if not plain]
        # Meanwhile: the reference does not hold the interpreter's lock.
        reference = self._aside.submit(
            self._backend.encode_batch, [group.texts[i] for i in others], add_special_tokens=False
        )
        found = [b""] * len(group.texts)
        for c, segment in enumerate(skeleton.own):
            shared = any(skeleton.roles[m] == "system" for m in segment.messages)
            encode = self._remember if shared else self._pieces.encode
            own = slice(c, None, len(skeleton.own))
            found[own] = [encode(text) if plain else b"" for text, plain in zip(group.texts[own], group.plain[own], strict=True)]  # fmt: skip
        for i, encoding in zip(others, reference.result(), strict=True):
            found[i] = np.array(encoding.ids, dtype=np.int32).tobytes()
        return found, len(others)

    def _remember(self, text: str) -> bytes:
        """The ids of a text that many rows are likely to share."""
        ids = self._remembered.get(text)
        if ids is None:
            ids = self._pieces.encode(text)
            if len(self._remembered) < REMEMBERED:
                self._remembered[text] = ids
        return ids

    # -- whole columns ---------------------------------------------------------------------------------------

    def _encode_group(self, batch: pa.RecordBatch, skeleton: Skeleton, group: _Group) -> Encoded:
        blobs, by_reference = self._ids(skeleton, group)
        rows = np.array(group.rows, dtype=np.int64)
        ids = np.frombuffer(
            b"".join(_laid_out(skeleton, blobs, [s.ids for s in skeleton.segments])), np.int32
        )
        text = "".join(_laid_out(skeleton, group.texts, [s.text for s in skeleton.segments])).encode()
        grid = _Grid(
            tokens=_counts(skeleton, [len(b) // 4 for b in blobs], [len(s.ids) // 4 for s in skeleton.segments], len(rows)),
            octets=_counts(skeleton, _octets(group), [len(s.text.encode()) for s in skeleton.segments], len(rows)),
        )  # fmt: skip
        widths = self._pieces.byte_lengths[ids]
        ends = np.cumsum(widths)
        good = self._decodes(ids, text, grid, np.concatenate([[0], ends]))
        loss = np.zeros(len(ids) + 1, dtype=np.int8)
        for begin, end in {*skeleton.loss, *skeleton.turns, skeleton.final}:
            at = [grid.locate(place, ids, ends - widths, good) for place in (begin, end)]
            if (begin, end) in skeleton.loss:
                loss[at[0]] += 1
                loss[at[1]] -= 1
        supervised = np.cumsum(loss[:-1], dtype=np.int8) > 0
        supervised[grid.starts[:-1]] = False  # position 0 is never predicted
        counted = _sums(supervised, grid.starts)
        good &= counted > 0
        good &= _sums(self._is_control[ids], grid.starts) == len(skeleton.control)
        good &= grid.lengths <= self._tokens.max_length
        good &= grid.tokens[:, skeleton.prompt.segment] > 0
        examples = _examples(batch.take(pa.array(rows)), grid, ids, supervised, counted, skeleton.prompt)
        if not good.all():
            examples, rows = examples.filter(pa.array(good)), rows[good]
        return Encoded(rows, examples, [skeleton] * len(rows), by_reference)

    def _decodes(self, ids: npt.NDArray[np.int32], text: bytes, grid: "_Grid", ends: Ints) -> npt.NDArray[np.bool_]:  # fmt: skip
        """For each row whether its ids stand for exactly the bytes of its text."""
        decoded = self._pieces.text_of(ids)
        if decoded == text:
            return np.ones(len(grid.lengths), dtype=bool)
        bounds, own = (
            ends[grid.starts].tolist(),
            np.concatenate([[0], np.cumsum(grid.octets[:, -1])]).tolist(),
        )
        return np.array([decoded[a:b] == text[c:d] for a, b, c, d in zip(bounds, bounds[1:], own, own[1:], strict=False)])  # fmt: skip


@dataclass(frozen=True)
class _Grid:
    """Where the segments of a group's rows lie.

    Attributes:
        tokens: int64 (rows, segments + 1): tokens of the row before each segment, and in all.
        octets: The same in bytes of text.
    """

    tokens: Ints
    octets: Ints

    @property
    def lengths(self) -> Ints:
        return self.tokens[:, -1]

    @property
    def starts(self) -> Ints:
        """Tokens before each row, and in all."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def locate(self, place: Place, ids: npt.NDArray[np.int32], begins: Ints, good: npt.NDArray[np.bool_]) -> Ints:  # fmt: skip
        """The token at which a place lies in every row, derived twice; rows on which the two differ become not `good`.

        By token counts: those of the segments before it (and of the literal, whose ids must be there). By bytes: the
        token that begins where the text before the place ends.

        Args:
            begins: Bytes before each token, over all rows.
        """
        literal = np.frombuffer(place.ids, np.int32)
        by_tokens = self.starts[:-1] + self.tokens[:, place.segment]
        for i, expected in enumerate(literal):
            good &= ids[np.minimum(by_tokens + i, len(ids) - 1)] == expected
        by_tokens = by_tokens + len(literal)
        rows_before = np.concatenate([[0], np.cumsum(self.octets[:, -1])])[:-1]
        octet = rows_before + self.octets[:, place.segment] + len(place.literal.encode())
        by_bytes = np.searchsorted(begins, octet)
        total = int(begins[-1]) if len(begins) else 0
        found = np.where(by_bytes < len(begins), begins[np.minimum(by_bytes, len(begins) - 1)], octet)
        good &= (by_bytes == by_tokens) & ((found == octet) | (octet > total))
        return np.minimum(by_tokens, len(ids))


def _laid_out(skeleton: Skeleton, own: Sequence, constant: Sequence) -> list:
    """What rows have in their segments, row after row, with the constants in their places."""
    columns = [i for i, s in enumerate(skeleton.segments) if s.parts]
    width, rows = len(skeleton.segments), len(own) // len(columns)
    out = list(constant) * rows
    for at, column in enumerate(columns):
        out[column::width] = own[at :: len(columns)]
    return out


def _counts(skeleton: Skeleton, own: Sequence[int], constant: Sequence[int], rows: int) -> Ints:
    """int64 (rows, segments + 1): running totals of a size per segment."""
    sizes = np.array(_laid_out(skeleton, own, constant), dtype=np.int64).reshape(rows, -1)
    return np.concatenate([np.zeros((rows, 1), np.int64), np.cumsum(sizes, axis=1)], axis=1)


def _octets(group: _Group) -> list[int]:
    return [len(t) if plain else len(t.encode()) for t, plain in zip(group.texts, group.plain, strict=True)]


def _sums(flags: npt.NDArray[np.bool_], starts: Ints) -> Ints:
    return np.add.reduceat(flags, starts[:-1], dtype=np.int64)


def _is_plain(texts: pa.Array) -> list[bool]:
    odd = pc.match_substring_regex(pc.fill_null(texts, ""), ODD_CONTROL)
    return pc.and_not(pc.string_is_ascii(pc.fill_null(texts, "")), odd).to_pylist()


def _examples(
    rows: pa.RecordBatch, grid: _Grid, ids: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_], counted: Ints, prompt: Place,
) -> pa.RecordBatch:  # fmt: skip
    messages = rows.column("messages")
    last = messages.offsets.to_numpy()[1:] - 1 - messages.offsets[0].as_py()
    offsets = pa.array(grid.starts.astype(np.int32))
    labels = np.where(supervised, ids, np.int32(IGNORE))
    return pa.RecordBatch.from_arrays(
        [
            rows.column("row_id"),
            rows.column("group"),
            pa.ListArray.from_arrays(offsets, pa.array(ids)),
            pa.ListArray.from_arrays(offsets, pa.array(labels)),
            pa.array(grid.lengths.astype(np.int32)),
            pa.array(counted.astype(np.int32)),
            pa.array(grid.tokens[:, prompt.segment].astype(np.int32)),
            pa.array(np.zeros(len(grid.lengths), np.int32)),
            messages.flatten().field("content").take(pa.array(last)),
        ],
        schema=TOKENIZED,
    )


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)

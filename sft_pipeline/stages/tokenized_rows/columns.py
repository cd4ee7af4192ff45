"""Many rows at once: the same examples as `RowEncoder` makes, by skeletons, chunks and array arithmetic.

    contents -> skeletons -> texts of their segments -> chunks -> ids -> mask, twice -> Arrow

Rows that this cannot do (tool calls, weights, overlong rows, templates that cannot be traced, ...) are simply not among
those that come back; `RowEncoder` does them one by one, and says what is wrong with those that have to be rejected.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.byte_level import ODD_CONTROL
from sft_pipeline.stages.tokenized_rows.chunks import ChunkEncoder, Ints, text_bytes
from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.skeleton import Place, Skeleton, Skeletons
from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer, any_of

TEXT_AT_ONCE = 64 << 20  # bytes of text that are encoded together, unless one row has more


@dataclass(frozen=True)
class Encoded:
    """Rows of a batch, encoded.

    Attributes:
        rows: Their indices in the batch, ascending.
        examples: One for each, in the schema TOKENIZED.
        kinds: The skeletons there are.
        kind: Which of them each row has.
        by_reference: Texts that the reference tokenizer had to encode, because they are not plain.
    """

    rows: Ints
    examples: pa.RecordBatch
    kinds: list[Skeleton]
    kind: Ints
    by_reference: int


@dataclass(frozen=True)
class _Group:
    """Rows of a batch that share a skeleton.

    Attributes:
        rows: Their indices in the batch.
        texts: By text segment: the text of each row.
        plain: By text segment: whether it is plain.
    """

    skeleton: Skeleton
    rows: Ints
    texts: list[pa.StringArray]
    plain: list[npt.NDArray[np.bool_]]

    def filter(self, wanted: npt.NDArray[np.bool_]) -> "_Group":
        mask = pa.array(wanted)
        return _Group(
            self.skeleton,
            self.rows[wanted],
            [t.filter(mask) for t in self.texts],
            [p[wanted] for p in self.plain],
        )


class ColumnEncoder:
    """Encodes whole batches under one tokenizer, template and mask. May be used by several threads.

    Raises:
        Unsupported: The tokenizer is not one that `ChunkEncoder` can encode with.
        Untraceable: The template cannot be traced.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, tokens: TokensConfig, system: str | None = None
    ) -> None:
        self._tokens, self._system = tokens, system
        self._chunks = ChunkEncoder(tokenizer)
        self._skeletons = Skeletons(template, tokenizer, tokens.supervise)
        self._added = any_of(tokenizer.added).search
        # The first two characters of an added token are rarely in a text, and are found without a look at each text.
        self._hint = "|".join(
            "".join(f"\\x{{{ord(c):x}}}" for c in hint) for hint in sorted({t[:2] for t in tokenizer.added})
        )
        self._is_control = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_control[list(tokenizer.control_ids)] = True

    def encode(self, batch: pa.RecordBatch) -> Encoded:
        """Those rows of a batch of grouped_split that can be encoded this way."""
        groups = [part for group in self._gather(batch) for part in _manageable(group)]
        parts = [self._encode_group(batch, group) for group in groups]
        rows = np.concatenate([np.zeros(0, np.int64), *(p.rows for p in parts)])
        examples = pa.Table.from_batches([p.examples for p in parts], TOKENIZED)
        kind = np.repeat(np.arange(len(parts)), [len(p.rows) for p in parts])
        if len(parts) > 1:
            order = np.argsort(rows, kind="stable")
            examples, rows, kind = examples.take(pa.array(order)), rows[order], kind[order]
        return Encoded(
            rows, _one_batch(examples), [g.skeleton for g in groups], kind, sum(p.by_reference for p in parts)
        )

    # -- text ------------------------------------------------------------------------------------------------

    def _gather(self, batch: pa.RecordBatch) -> list[_Group]:
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
        roles = flat.field("role").dictionary_encode()
        codes, spans = roles.indices.to_numpy().astype(np.uint8).tobytes(), bounds.tolist()
        alike: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(fit).tolist():
            alike.setdefault(codes[spans[row] : spans[row + 1]], []).append(row)
        names = roles.dictionary.to_pylist()
        return [
            group
            for code, rows in alike.items()
            if names[code[-1]] == "assistant"
            for group in self._by_skeleton(tuple(names[c] for c in code), np.array(rows), bounds, content)
        ]

    def _by_skeleton(
        self, roles: tuple[str, ...], rows: Ints, bounds: Ints, content: pa.StringArray
    ) -> list[_Group]:
        """Rows with the same roles."""
        contents = [content.take(pa.array(bounds[rows] + m)) for m in range(len(roles))]
        if self._system is not None and "system" not in roles:
            roles, contents = ("system", *roles), [pa.repeat(self._system, len(rows)), *contents]
        plain = [_is_plain(texts) for texts in contents]
        groups = []
        for skeleton, at in self._skeletons.of(roles, contents):
            index = pa.array(at)
            texts = [segment.filled([c.take(index) for c in contents]) for segment in skeleton.own]
            forged = np.zeros(len(at), dtype=bool)
            for column in texts:
                forged |= self._has_added(column)
            each = [np.all([plain[m][at] for m in s.messages], axis=0) & s.is_plain for s in skeleton.own]
            group = _Group(skeleton, rows[at], texts, each)
            groups.append(group.filter(~forged) if forged.any() else group)
        return [group for group in groups if len(group.rows)]

    def _has_added(self, texts: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Whether a text, of the contents alone or with the template's own, holds an added token."""
        found = np.zeros(len(texts), dtype=bool)
        if self._hint:
            hinted = np.flatnonzero(
                pc.match_substring_regex(texts, self._hint).to_numpy(zero_copy_only=False)
            )
            found[hinted] = [self._added(t) is not None for t in texts.take(pa.array(hinted)).to_pylist()]
        return found

    # -- whole columns ---------------------------------------------------------------------------------------

    def _encode_group(self, batch: pa.RecordBatch, group: _Group) -> "_Part":
        """Those rows of the group that turn out well."""
        skeleton, count = group.skeleton, len(group.rows)
        by_reference = 0
        for segment, column, plain in zip(skeleton.own, group.texts, group.plain, strict=True):
            by_reference += len(plain) - int(np.count_nonzero(plain))
            if skeleton.is_shared(segment):
                self._chunks.remember(column.unique().to_pylist())
        texts = _laid_out(group)
        constants = {s.text: s.ids for s in skeleton.segments if not s.parts}
        done = self._chunks.encode(texts, _not_cut(group), constants)
        faithful: npt.NDArray[np.bool_] = np.all(done.faithful.reshape(count, -1), axis=1)
        if not faithful.all():  # the bytes of all rows are counted together below
            kept = group.filter(faithful)
            part = self._encode_group(batch, kept) if len(kept.rows) else _Part(kept.rows, _NONE, 0)
            return replace(part, by_reference=by_reference)
        width, ids = len(skeleton.segments), done.ids
        grid = _Grid(_running(done.ends, width), _running(text_bytes(texts)[1], width))
        widths = self._chunks.byte_level.byte_lengths[ids]
        begins = np.cumsum(widths)
        begins -= widths
        good = np.ones(count, dtype=bool)
        loss = np.zeros(len(ids) + 1, dtype=np.int8)
        for begin, end in {*skeleton.loss, *skeleton.turns, skeleton.final}:
            at = [grid.locate(place, ids, begins, good) for place in (begin, end)]
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
        rows = group.rows
        examples = _examples(batch.take(pa.array(rows)), grid, ids, supervised, counted, skeleton.prompt)
        if not good.all():
            examples, rows = examples.filter(pa.array(good)), rows[good]
        return _Part(rows, examples, by_reference)


@dataclass(frozen=True)
class _Part:
    """Rows of one skeleton, encoded; as in `Encoded`."""

    rows: Ints
    examples: pa.RecordBatch
    by_reference: int


_NONE = pa.RecordBatch.from_pylist([], schema=TOKENIZED)


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

    def locate(
        self, place: Place, ids: npt.NDArray[np.int32], begins: Ints, good: npt.NDArray[np.bool_]
    ) -> Ints:
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


def _manageable(group: _Group) -> list[_Group]:
    """The group in parts whose text fits into the memory and into 32-bit offsets."""
    count = len(group.rows)
    if count < 2 or sum(pc.sum(pc.binary_length(t)).as_py() for t in group.texts) <= TEXT_AT_ONCE:
        return [group]
    first: npt.NDArray[np.bool_] = np.arange(count) < count // 2
    return [part for half in (first, ~first) for part in _manageable(group.filter(half))]


def _laid_out(group: _Group) -> pa.StringArray:
    """What the rows have in their segments, row after row, with the constants in their places."""
    segments, count = group.skeleton.segments, len(group.rows)
    constants = [s.text for s in segments if not s.parts]
    begins = iter(range(0, count * len(group.texts), count or 1))
    begins_constant = iter(range(count * len(group.texts), count * len(group.texts) + len(constants)))
    index = np.stack(
        [
            next(begins) + np.arange(count) if s.parts else np.full(count, next(begins_constant))
            for s in segments
        ],
        axis=1,
    )
    cells = pa.concat_arrays([*group.texts, pa.array(constants, pa.string())])
    return cells.take(pa.array(index.reshape(-1)))


def _not_cut(group: _Group) -> npt.NDArray[np.bool_]:
    """Of those texts, which are looked up as they are: constants, what is not plain, what many rows share."""
    plain = iter(group.plain)
    everywhere = np.ones(len(group.rows), dtype=bool)
    columns = [
        ~next(plain) | group.skeleton.is_shared(s) if s.parts else everywhere for s in group.skeleton.segments
    ]
    return np.stack(columns, axis=1).reshape(-1)


def _running(ends: Ints, width: int) -> Ints:
    """int64 (rows, width + 1): totals from the beginning of each row, given those from the beginning of all."""
    rows = np.arange(0, len(ends) - 1, width)[:, None]
    return ends[rows + np.arange(width + 1)] - ends[rows]


def _sums(flags: npt.NDArray[np.bool_], starts: Ints) -> Ints:
    return np.add.reduceat(flags, starts[:-1], dtype=np.int64)


def _is_plain(texts: pa.StringArray) -> npt.NDArray[np.bool_]:
    odd = pc.match_substring_regex(texts, ODD_CONTROL)
    return pc.and_not(pc.string_is_ascii(texts), odd).to_numpy(zero_copy_only=False)


def _examples(
    rows: pa.RecordBatch,
    grid: _Grid,
    ids: npt.NDArray[np.int32],
    supervised: npt.NDArray[np.bool_],
    counted: Ints,
    prompt: Place,
) -> pa.RecordBatch:
    messages = rows.column("messages")
    last = messages.offsets.to_numpy()[1:] - 1 - messages.offsets[0].as_py()
    offsets = pa.array(grid.starts.astype(np.int32))
    labels = np.where(supervised, ids, np.int32(IGNORE_LABEL))
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

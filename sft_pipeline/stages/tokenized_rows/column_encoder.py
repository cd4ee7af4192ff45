"""The fast encoder: the examples of the reference (`RowEncoder`), by layouts, a word cache and arrays.

    contents -> layout -> texts of the segments -> ids -> mask, derived twice -> Arrow

Rows that this cannot do (tool calls, weights other than 1, overlong rows, text that changes how the template
renders, ...) are simply not among those that come back: the reference encodes them one by one, and says what
is wrong with those that have to be rejected.
"""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_layout import Boundary, RowLayout, find_layout, find_triggers
from sft_pipeline.stages.tokenized_rows.word_cache import (
    Ints,
    NoFastPath,
    WordCache,
    running_totals,
    text_bytes,
)
from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED
from sft_pipeline.text.conversation import turn_markers
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer, any_of

# Sequences of roles. Finding a layout costs a few milliseconds, which rare ones do not repay.
MAX_LAYOUTS = 200
TEXT_AT_ONCE = 64 << 20  # bytes of text that are encoded together, unless one row has more
_WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace())  # what Python's strip() takes away
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedColumns:
    """Those rows of a batch that the fast encoder encoded.

    Attributes:
        rows: int64, their indices in the batch, ascending.
        examples: One for each, in the schema TOKENIZED.
        layouts: The layouts there are.
        layout: int64, which of them each row has.
    """

    rows: Ints
    examples: pa.RecordBatch
    layouts: list[RowLayout]
    layout: Ints


class ColumnEncoder:
    """Encodes batches by columns under one tokenizer, template and mask. May be used by several threads.

    Args:
        system: A system message for conversations that have none.

    Raises:
        NoFastPath: The tokenizer or the template does not allow it; the message says why.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, tokens: TokensConfig, system: str | None = None
    ) -> None:
        if template.stop is None or template.stop not in tokenizer.added:
            raise NoFastPath("the template's turns do not end in a single added token")
        self._tokenizer, self._template, self._tokens, self._system = tokenizer, template, tokens, system
        self._words = WordCache(tokenizer)
        self._layouts: dict[tuple[str, ...], RowLayout | None] = {}
        self._layouts_lock = threading.Lock()
        self._added = _Finder(tokenizer.added)
        triggers = find_triggers(template, tokens.supervise)
        self._triggers, self._edges_matter = (
            _Finder([*triggers.texts, *turn_markers(template, tokenizer)]),
            triggers.edges,
        )
        self._is_control = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_control[list(tokenizer.control_ids)] = True

    def encode(self, batch: pa.RecordBatch) -> EncodedColumns:
        """Those rows of a batch of grouped_split that can be encoded this way."""
        rows, layout = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        examples: list[pa.RecordBatch] = []
        layouts: list[RowLayout] = []
        for group in self._groups(batch):
            for part in _by_size(group):
                done, kept = self._encode_group(batch, part)
                rows.append(kept)
                examples.append(done)
                layout.append(np.full(len(kept), len(layouts)))
                layouts.append(part.layout)
        indices, which = np.concatenate(rows), np.concatenate(layout)
        order = np.argsort(indices, kind="stable")
        table = pa.Table.from_batches(examples, TOKENIZED)
        if len(examples) > 1:
            table = table.take(pa.array(order))
        return EncodedColumns(indices[order], one_batch(table), layouts, which[order])

    def _groups(self, batch: pa.RecordBatch) -> list["_Group"]:
        """The rows that are rendered as a layout predicts, by layout."""
        messages = batch.column("messages")
        flat = messages.flatten()
        bounds = messages.offsets.to_numpy().astype(np.int64)
        bounds -= bounds[0] if len(bounds) else 0
        content = flat.field("content")
        unfit = pc.or_(
            pc.equal(pc.fill_null(content, ""), ""),
            pc.not_equal(pc.fill_null(flat.field("weight"), 1.0), 1.0),
        )
        others = ("tool_calls", "reasoning_content", "name", "tool_call_id")
        for name in (*others, "input_at") if self._template.input_heading else others:
            unfit = pc.or_(unfit, pc.is_valid(flat.field(name)))
        unfit_before = running_totals(unfit.to_numpy(zero_copy_only=False))
        fit = (unfit_before[bounds[1:]] == unfit_before[bounds[:-1]]) & (bounds[1:] > bounds[:-1])
        fit &= batch.column("tools").is_null().to_numpy(zero_copy_only=False)
        roles = flat.field("role").dictionary_encode()
        names = roles.dictionary.to_pylist()
        codes, spans = roles.indices.to_numpy().astype(np.uint8).tobytes(), bounds.tolist()
        alike: dict[bytes, list[int]] = {}
        for row in np.flatnonzero(fit).tolist():
            alike.setdefault(codes[spans[row] : spans[row + 1]], []).append(row)
        groups = []
        for code, members in alike.items():
            rows, of_roles = np.array(members), tuple(names[c] for c in code)
            contents = [content.take(pa.array(bounds[rows] + m)) for m in range(len(code))]
            if self._system is not None and "system" not in of_roles:
                of_roles, contents = ("system", *of_roles), [pa.repeat(self._system, len(rows)), *contents]
            if of_roles[-1] == "assistant" and (layout := self._layout(of_roles)) is not None:
                group = self._as_predicted(layout, rows, contents)
                groups += [group] if len(group.rows) else []
        return groups

    def _layout(self, roles: tuple[str, ...]) -> RowLayout | None:
        with self._layouts_lock:
            if roles not in self._layouts:
                if len(self._layouts) == MAX_LAYOUTS:
                    return None
                self._layouts[roles] = find_layout(
                    self._template, self._tokenizer, roles, self._tokens.supervise
                )
            return self._layouts[roles]

    def _as_predicted(self, layout: RowLayout, rows: Ints, contents: Sequence[pa.StringArray]) -> "_Group":
        """The rows whose contents do not change the rendering, with the texts of their segments."""
        good = np.ones(len(rows), dtype=bool)
        for column in contents:
            good &= ~self._triggers.found_in(column)
            if self._edges_matter:
                good &= pc.equal(column, pc.utf8_trim(column, _WHITE_SPACE)).to_numpy(zero_copy_only=False)
        outcome = layout.outcome
        good &= ~_found_in_inserted(contents[-1], outcome.inserted_before or "", outcome.inserted_after or "")
        texts = []
        for index in layout.text_segments:
            parts = layout.segments[index]
            texts_of_parts = [p if isinstance(p, str) else contents[p] for p in parts]
            column = pc.binary_join_element_wise(*texts_of_parts, "")
            good &= ~self._added.found_in(column)  # also one that the template and a content spell together
            texts.append(column)
        return _Group(layout, rows, texts).filter(good)

    def _encode_group(self, batch: pa.RecordBatch, group: "_Group") -> tuple[pa.RecordBatch, Ints]:
        """Examples of those rows of the group that pass every check, and their indices in the batch."""
        layout, count = group.layout, len(group.rows)
        texts = group.laid_out()
        is_added = np.array([parts[0] in self._tokenizer.added for parts in layout.segments])
        encoded = self._words.encode(texts, np.tile(is_added, count))
        faithful: Bools = np.all(encoded.faithful.reshape(count, -1), axis=1)
        if not faithful.all():  # bytes are counted over all rows below, so these have to be left out before
            kept = group.filter(faithful)
            return self._encode_group(batch, kept) if len(kept.rows) else (_NONE, kept.rows)
        width, ids = len(layout.segments), encoded.ids
        grid = _Grid(_per_row(encoded.ends, width), _per_row(text_bytes(texts)[1], width))
        begins = np.cumsum(self._words.byte_lengths[ids])
        begins -= self._words.byte_lengths[ids]
        good = np.ones(count, dtype=bool)
        change = np.zeros(len(ids) + 1, dtype=np.int8)  # +1 where a span begins, -1 where it ends
        for begin, end in {*layout.loss, *layout.turns, layout.final}:
            first, stop = (
                grid.locate(b, self._tokenizer.ids(b.literal) if b.literal else [], ids, begins, good)
                for b in (begin, end)
            )
            if (begin, end) in layout.loss:
                change[first] += 1
                change[stop] -= 1
        supervised = np.cumsum(change[:-1], dtype=np.int8) > 0
        supervised[grid.starts[:-1]] = False  # position 0 is never predicted
        counted = np.add.reduceat(supervised, grid.starts[:-1], dtype=np.int64)
        control = np.add.reduceat(self._is_control[ids], grid.starts[:-1], dtype=np.int64)
        good &= (counted > 0) & (control == layout.control_tokens)
        good &= (grid.lengths <= self._tokens.max_length) & (grid.tokens[:, layout.prompt.segment] > 0)
        of_rows = batch.take(pa.array(group.rows))
        lists = pa.array(grid.starts.astype(np.int32))
        labels = np.where(supervised, ids, np.int32(IGNORE_LABEL))
        examples = pa.RecordBatch.from_arrays(
            [
                of_rows.column("row_id"),
                of_rows.column("group"),
                pa.ListArray.from_arrays(lists, pa.array(ids)),
                pa.ListArray.from_arrays(lists, pa.array(labels)),
                pa.nulls(count, TOKENIZED.field("weights").type),
                pa.array(grid.lengths.astype(np.int32)),
                pa.array(counted.astype(np.int32)),
                pa.array(grid.tokens[:, layout.prompt.segment].astype(np.int32)),
                pa.array(np.zeros(count, np.int32)),
                completions_of(of_rows),
            ],
            schema=TOKENIZED,
        )
        if good.all():
            return examples, group.rows
        return examples.filter(pa.array(good)), group.rows[good]


_NONE = pa.RecordBatch.from_pylist([], schema=TOKENIZED)


@dataclass(frozen=True)
class _Group:
    """Rows of a batch that share a layout.

    Attributes:
        rows: Their indices in the batch.
        texts: By text segment: the text of each row.
    """

    layout: RowLayout
    rows: Ints
    texts: list[pa.StringArray]

    def filter(self, wanted: Bools) -> "_Group":
        mask = pa.array(wanted)
        return _Group(self.layout, self.rows[wanted], [t.filter(mask) for t in self.texts])

    def laid_out(self) -> pa.StringArray:
        """The segments of all rows, row after row, the constant ones in their places."""
        count, own = len(self.rows), iter(self.texts)
        texts: list[pa.StringArray] = []
        columns, before = [], 0
        for index, parts in enumerate(self.layout.segments):
            is_own = index in self.layout.text_segments
            texts.append(next(own) if is_own else pa.array(["".join(map(str, parts))], pa.string()))
            columns.append(before + (np.arange(count) if is_own else np.zeros(count, np.int64)))
            before += len(texts[-1])
        return pa.concat_arrays(texts).take(pa.array(np.stack(columns, axis=1).reshape(-1)))


@dataclass(frozen=True)
class _Grid:
    """Where the segments of a group's rows begin.

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
        """int64 (rows + 1,): tokens before each row, and in all."""
        return running_totals(self.lengths)

    def locate(
        self,
        boundary: Boundary,
        literal: Sequence[int],
        ids: npt.NDArray[np.int32],
        begins: Ints,
        good: Bools,
    ) -> Ints:
        """The token at which a boundary lies in every row, derived twice; where the two differ, not `good`.

        By token counts: those of the segments before it (and of the literal, whose ids must be there).
        By bytes: the token that begins where the text before the boundary ends.

        Args:
            literal: Ids of the boundary's literal.
            begins: int64 (tokens,): bytes before each token, over all rows.
            good: bool (rows,), changed in place.
        """
        by_tokens = self.starts[:-1] + self.tokens[:, boundary.segment]
        for i, expected in enumerate(literal):
            good &= ids[np.minimum(by_tokens + i, len(ids) - 1)] == expected
        by_tokens = by_tokens + len(literal)
        octets_before = running_totals(self.octets[:, -1])
        octet = octets_before[:-1] + self.octets[:, boundary.segment] + len(boundary.literal.encode())
        by_bytes = np.searchsorted(begins, octet)
        # A row's end is where the next one's first token begins, and none follows the last row.
        begins_there = np.append(begins, octets_before[-1])[by_bytes] == octet
        good &= (by_bytes == by_tokens) & begins_there
        return np.minimum(by_tokens, len(ids))


class _Finder:
    """Finds the texts that hold one of some strings; most hold none."""

    def __init__(self, strings: Iterable[str]) -> None:
        strings = list(strings)
        self._search = any_of(strings).search
        # Their first two characters are rarely in a text. One regular expression over a column finds them,
        # without making Python strings; a thousand whole tokens would be too many for it.
        hints = sorted({s[:2] for s in strings})
        self._hint = "|".join("".join(f"\\x{{{ord(c):x}}}" for c in hint) for hint in hints)

    def found_in(self, texts: pa.StringArray) -> Bools:
        """bool (texts,)"""
        found = np.zeros(len(texts), dtype=bool)
        if self._hint:
            hinted = pc.match_substring_regex(texts, self._hint).to_numpy(zero_copy_only=False).nonzero()[0]
            found[hinted] = [self._search(t) is not None for t in texts.take(pa.array(hinted)).to_pylist()]
        return found


def _found_in_inserted(completions: pa.StringArray, before: str, after: str) -> Bools:
    """Which completions are also in what the template writes around them, and would be found there."""
    found = np.zeros(len(completions), dtype=bool)
    if not before and not after:
        return found
    # Such a completion is inside that text, or begins inside it: it is short, or begins with one of its ends.
    suspect = pc.less_equal(pc.binary_length(completions), max(len(before.encode()), len(after.encode())))
    for i in range(len(before)):
        suspect = pc.or_(suspect, pc.starts_with(completions, before[i:]))
    for row in np.flatnonzero(suspect.to_numpy(zero_copy_only=False)).tolist():
        text = completions[row].as_py()
        found[row] = (before + text).find(text) != len(before) or text in after
    return found


def _by_size(group: _Group) -> list[_Group]:
    """The group in parts whose text fits into memory and into Arrow's 32-bit offsets."""
    count = len(group.rows)
    if count < 2 or sum(pc.sum(pc.binary_length(t)).as_py() for t in group.texts) <= TEXT_AT_ONCE:
        return [group]
    first: Bools = np.arange(count) < count // 2
    return [part for half in (first, ~first) for part in _by_size(group.filter(half))]


def _per_row(ends: Ints, width: int) -> Ints:
    """int64 (rows, width + 1): totals from the beginning of each row, given totals over all rows."""
    rows = np.arange(0, len(ends) - 1, width)[:, None]
    return ends[rows + np.arange(width + 1)] - ends[rows]


def completions_of(rows: pa.RecordBatch) -> pa.StringArray:
    """The final assistant message of each row; "" where it has no text."""
    messages = rows.column("messages")
    last = np.maximum(messages.offsets.to_numpy()[1:] - 1 - messages.offsets[0].as_py(), 0)
    return pc.fill_null(messages.flatten().field("content").take(pa.array(last)), "")


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table as a single batch, also where it has no rows."""
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)

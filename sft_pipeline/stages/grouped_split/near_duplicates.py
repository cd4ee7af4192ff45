"""Rows that resemble a held-out row: their Jaccard similarity of word 3-grams reaches a threshold.

The search is exact: an all-pairs set join by prefix filtering (Bayardo, Ma, Srikant 2007; Xiao et al. 2008)
instead of MinHash-LSH, which misses some pairs by chance. Two rows that are similar enough meet in a shingle
of their prefixes (`prefix_index`), where few others meet; of those, bitmaps leave few, and what these have in
common is counted. Rows with equal sets are one node.

    shingle sets --equal sets joined--> nodes --prefixes--> index --meetings--> neighbours --by split-->
    duplicates

Where very many rows share their rare shingles (the same sentences in another order), the number of pairs that
meet is quadratic. Those are compared by bitmap in whole blocks of asked and near rows, at some 20 nanoseconds
a pair.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sft_pipeline.stages.grouped_split.prefix_index import PrefixIndex
from sft_pipeline.stages.grouped_split.shingles import ShingleSets, distinct, ranges
from sft_pipeline.stages.grouped_split.split import TEST, TRAIN, VALIDATION
from sft_pipeline.tables.schemas import SPLITS

PAIRS_AT_ONCE = 1 << 20
BLOCK = 1 << 16  # pairs of a block, so that its arrays stay in the CPU's caches
MANY_PAIRS = 1 << 13  # that meet in one shingle: they are compared in blocks
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
Progress = Callable[[float, float], None]
"""Told (done, total) of a search, in any unit."""


def neighbours(
    sets: ShingleSets,
    index: PrefixIndex,
    near: np.ndarray,
    asked: np.ndarray,
    progress: Progress = lambda done, total: None,
) -> Pairs:
    """For each asked node that has one, a neighbour among the `near` nodes.

    Args:
        near, asked: Masks over rows (only nodes count), disjoint.

    Returns:
        (asked node, its neighbour, their similarity), by ascending asked node.
    """
    open_ = asked.copy()
    found: list[Pairs] = []
    near_short, near_rest = (part[near[_nodes(part)]] for part in (index.short, index.rest))
    asked_short, asked_rest = (part[asked[_nodes(part)]] for part in (index.short, index.rest))
    # Who is larger where they meet in the rest of a prefix: its owner, since a pair of equal sizes meets in
    # the short ones.
    joins = ((asked_short, near_short, 0), (asked_short, near_rest, -1), (asked_rest, near_short, 1))
    met = [_met(one, other) for one, other, _ in joins]
    total = float(sum((m.asked_count * m.near_count).sum() for m in met)) or 1.0
    done = 0.0
    for (one, other, larger), m in zip(joins, met):
        pairs = m.asked_count * m.near_count
        few = pairs < MANY_PAIRS
        for some in _by_pairs(m.select(few)):
            entries = one[ranges(some.asked_start, some.asked_count)]
            left = np.repeat(some.near_start, some.asked_count)
            count = np.repeat(some.near_count, some.asked_count)
            _search(sets, index, larger, _nodes(entries), _nodes(other), left, count, open_, found)
            done += float((some.asked_count * some.near_count).sum())
            progress(done, total)
        for i in np.flatnonzero(~few).tolist():
            asked_here = _nodes(one[m.asked_start[i] : m.asked_start[i] + m.asked_count[i]])
            near_here = _nodes(other[m.near_start[i] : m.near_start[i] + m.near_count[i]])
            _search_block(sets, index, larger, asked_here, near_here, open_, found)
            done += float(pairs[i])
            progress(done, total)
    node, neighbour, similarity = _joined(found)
    order = np.argsort(node, kind="stable")
    return node[order], neighbour[order], similarity[order]


@dataclass(frozen=True)
class _Meetings:
    """The shingles in which asked and near nodes meet: where each begins among their entries, and how many
    have it (int64 each).
    """

    asked_start: np.ndarray
    asked_count: np.ndarray
    near_start: np.ndarray
    near_count: np.ndarray

    def select(self, which: np.ndarray) -> "_Meetings":
        return _Meetings(*(values[which] for values in vars(self).values()))


def _met(one: np.ndarray, other: np.ndarray) -> _Meetings:
    shingle, theirs = one >> np.uint64(32), other >> np.uint64(32)
    start = np.flatnonzero(np.concatenate([[True], shingle[1:] != shingle[:-1]])[: len(shingle)])
    count = np.diff(np.append(start, len(shingle)))
    left = np.searchsorted(theirs, shingle[start])
    near = np.searchsorted(theirs, shingle[start], "right") - left
    return _Meetings(start, count, left, near).select(near > 0)


def _nodes(entries: np.ndarray) -> np.ndarray:
    return (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _joined(found: list[Pairs]) -> Pairs:
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    one, other, similarity = map(np.concatenate, zip(none, *found))
    return one, other, similarity


def _by_pairs(met: _Meetings) -> list[_Meetings]:
    """The same, about PAIRS_AT_ONCE entries of asked nodes at a time."""
    chunk = np.cumsum(met.asked_count) // PAIRS_AT_ONCE
    pieces = np.split(np.arange(len(chunk)), np.flatnonzero(np.diff(chunk)) + 1)
    return [met.select(piece) for piece in pieces if len(piece)]


def _search(
    sets: ShingleSets,
    index: PrefixIndex,
    larger: int,
    asked: np.ndarray,
    near: np.ndarray,
    left: np.ndarray,
    count: np.ndarray,
    open_: np.ndarray,
    found: list[Pairs],
) -> None:
    """Compares the candidates of each index entry, and appends the pairs that are similar enough to `found`.

    It takes a few candidates of every entry at a time, so that a node which has found a neighbour is not
    compared again.

    Args:
        larger: 1: only pairs whose asked node is larger count, -1: whose near one is, 0: all.
        asked, left, count: For each entry its node, and where its candidates are in `near`.
        open_: Which nodes have no neighbour yet; updated in place.
    """
    step = 0
    while True:
        live = (count > step) & open_[asked]
        asked, left, count = asked[live], left[live], count[live]
        if not len(asked):
            return
        width = max(1, PAIRS_AT_ONCE // len(asked))
        take = np.minimum(count - step, width)
        one = np.repeat(asked, take)
        other = near[ranges(left + step, take)]
        if larger:
            fits = (index.size[one] - index.size[other]) * larger > 0
            one, other = one[fits], other[fits]
        keys = distinct((one.astype(np.uint64) << np.uint64(32)) | other.astype(np.uint64))
        _compare(sets, index, (keys >> np.uint64(32)).astype(np.int64), _nodes(keys), open_, found)
        step += width


def _search_block(
    sets: ShingleSets,
    index: PrefixIndex,
    larger: int,
    asked: np.ndarray,
    near: np.ndarray,
    open_: np.ndarray,
    found: list[Pairs],
) -> None:
    """Compares all `asked` nodes with all `near` ones; a few at first, which in a large cluster is enough.

    Args:
        larger: As for `_search`.
        open_: Which nodes have no neighbour yet; updated in place.
    """
    step, width = 0, 4
    asked = asked[open_[asked]]
    while step < len(near) and len(asked):
        some = near[step : step + width]
        for first in range(0, len(asked), rows := max(1, BLOCK // len(some))):
            here = asked[first : first + rows]
            gap = (index.size[here][:, None] - index.size[some]) * larger if larger else None
            if gap is not None and not (gap > 0).any():
                continue
            fits = index.may_reach(here[:, None], some[None, :])
            at, to = np.nonzero(fits if gap is None else fits & (gap > 0))
            _compare(sets, index, here[at], some[to], open_, found, filtered=True)
        asked = asked[open_[asked]]
        step, width = step + width, min(8 * width, BLOCK)


def _compare(
    sets: ShingleSets,
    index: PrefixIndex,
    one: np.ndarray,
    other: np.ndarray,
    open_: np.ndarray,
    found: list[Pairs],
    filtered: bool = False,
) -> None:
    """Appends to `found`, for each node of `one`, the most similar of its pairs that are similar enough.

    Args:
        open_: Which nodes have no neighbour yet; updated in place.
        filtered: Only pairs that `index.may_reach` are given.
    """
    if not filtered:
        fits = index.may_reach(one, other)
        one, other = one[fits], other[fits]
    if not len(one):
        return
    similarity = sets.similarity(one, other, index.threshold)
    good = similarity > 0
    one, other, similarity = one[good], other[good], similarity[good]
    best = np.lexsort((other, -similarity, one))
    firsts = best[np.unique(one[best], return_index=True)[1]]
    open_[one[firsts]] = False
    found.append((one[firsts], other[firsts], similarity[firsts]))


@dataclass(frozen=True)
class CrossSplitDuplicates:
    """Rows that resemble a row which is held out from them, by ascending row.

    Attributes:
        row: The row (int64).
        near: A held-out row that it is a near-duplicate of.
        similarity: Their Jaccard similarity.
    """

    row: np.ndarray
    near: np.ndarray
    similarity: np.ndarray

    @classmethod
    def none(cls) -> "CrossSplitDuplicates":
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def cross_split_duplicates(
    sets: ShingleSets,
    index: PrefixIndex,
    split: np.ndarray,
    progress: Progress = lambda done, total: None,
    *,
    dropped: bool = True,
) -> CrossSplitDuplicates:
    """Finds train and validation rows that resemble a test row, and train rows that resemble a validation
    row.

    The rule is about direct neighbours: a row that resembles only such a row, and no held-out one, is not
    among them. Without the rows that are, no held-out row has a near-duplicate in another split.

    Args:
        split: Index into SPLITS per row (int8).
        dropped: Whether the rows found will be dropped: then a validation row that resembles a test row keeps
            no train row out.
    """
    first = _first_rows(sets, split)
    is_node = sets.node == np.arange(len(sets))
    taken = np.zeros(len(sets), bool)  # nodes whose rows in the lower splits have been found
    rows: list[np.ndarray] = []
    near: list[np.ndarray] = []
    similarity: list[np.ndarray] = []

    def told(half: int) -> Progress:
        return lambda done, total: progress(half * total + done, 2 * total)

    for half, (held_out, lower) in enumerate(((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,)))):
        start = first[held_out] >= 0
        if dropped:
            start &= ~taken
        lower_there = np.any([first[s] >= 0 for s in lower], axis=0)
        asked = is_node & lower_there & ~start & ~taken
        one, other, found = neighbours(sets, index, start, asked, told(half))
        link, strength = np.full(len(sets), -1), np.ones(len(sets))
        link[one], strength[one] = first[held_out][other], found
        link[start] = first[held_out][start]
        hit = (link >= 0)[sets.node] & np.isin(split, lower)
        hit[np.concatenate([*rows, np.zeros(0, np.int64)])] = False  # found in the first half
        taken |= link >= 0
        rows.append(np.flatnonzero(hit))
        near.append(link[sets.node[rows[-1]]])
        similarity.append(strength[sets.node[rows[-1]]])
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    return CrossSplitDuplicates(row[order], np.concatenate(near)[order], np.concatenate(similarity)[order])


def leaked(
    sets: ShingleSets, index: PrefixIndex, split: np.ndarray, most: int | None = None
) -> dict[str, tuple[int, int]]:
    """Held-out rows with a near-duplicate in another split: for validation in train, for test in train or
    validation.

    Args:
        split: Index into SPLITS per row (int8); -1 for a row that is in none.
        most: Only about so many held-out nodes are looked at, evenly over all; None: all.

    Returns:
        For each held-out split (such rows, rows looked at).
    """
    first = _first_rows(sets, split)
    found = {}
    for held_out, lower in ((VALIDATION, (TRAIN,)), (TEST, (TRAIN, VALIDATION))):
        near = np.any([first[s] >= 0 for s in lower], axis=0)
        held = np.flatnonzero(first[held_out] >= 0)
        asked = np.zeros(len(sets), bool)
        asked[held[:: -(-len(held) // most) or 1] if most else held] = True
        hit = near & asked
        hit[neighbours(sets, index, near, asked & ~near)[0]] = True
        rows = sets.node[split == held_out]
        found[SPLITS[held_out]] = (int(hit[rows].sum()), int(asked[rows].sum()))
    return found


def _first_rows(sets: ShingleSets, split: np.ndarray) -> np.ndarray:
    """For each split and node the first row there with the node's set, or -1 (int64 [splits, rows])."""
    first = np.full((len(SPLITS), len(sets)), -1)
    for s in range(len(SPLITS)):
        rows = np.flatnonzero(split == s)[::-1]
        first[s][sets.node[rows]] = rows
    return first

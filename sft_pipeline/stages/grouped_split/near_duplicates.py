"""Pairs of rows whose Jaccard similarity of word 3-grams reaches a threshold, and those that cross splits.

The search is exact: an all-pairs set join by prefix filtering (Bayardo, Ma, Srikant 2007; Xiao et al. 2008)
instead of MinHash-LSH, which misses some pairs by chance. Put all shingles into one order, the rarest first.
The first shingle that x and y share, at position i of x, leaves them at most |x| - i in common. So if J(x, y)
>= t, it is among the |x| - ceil(t |x|) + 1 first of each, and among the |x| - ceil(2t/(1+t) |x|) + 1 first of
the smaller; few pairs without that similarity meet there. A bitmap of each set then bounds the overlap from
above, and what is left is counted. Rows with equal sets are one node.

    shingle sets --equal sets joined--> nodes --prefixes--> index --rounds--> neighbours --by split-->
    duplicates
"""

from dataclasses import dataclass

import numpy as np

from sft_pipeline.stages.grouped_split.shingles import ShingleSets, distinct, ranges
from sft_pipeline.stages.grouped_split.split import TEST, TRAIN, VALIDATION
from sft_pipeline.tables.schemas import SPLITS

PAIRS_AT_ONCE = 1 << 20
ROWS_AT_ONCE = 1 << 15
Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PrefixIndex:
    """(shingle << 32 | node), sorted (uint64): each node's short prefix, and the rest of its full prefix."""

    threshold: float
    short: np.ndarray
    rest: np.ndarray


def prefix_index(sets: ShingleSets, threshold: float) -> PrefixIndex:
    """The prefixes of all nodes, by shingle."""
    found: list[list[np.ndarray]] = [[np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]]
    for first in range(0, len(sets), ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, len(sets))
        size, hashes = sets.size[first:last], sets.read(first, last)
        row = np.repeat(np.arange(last - first, dtype=np.uint64) << np.uint64(48), size)
        rarity = sets.rarity(hashes).astype(np.uint64)
        ordered = row | (rarity << np.uint64(32)) | hashes
        ordered.sort()
        start = np.cumsum(size) - size
        full, short = (
            size - np.ceil(share * size - 1e-9).astype(np.int64) + 1
            for share in (threshold, 2 * threshold / (1 + threshold))
        )
        # An equal row stands for the others.
        stands_alone = sets.node[first:last] == np.arange(first, last)
        for entries, at, length in ((found[0], start, short), (found[1], start + short, full - short)):
            taken = ordered[ranges(at, np.where(stands_alone, length, 0))]
            entries.append((taken << np.uint64(32)) | ((taken >> np.uint64(48)) + np.uint64(first)))
    merged = []
    for entries in found:
        together = np.concatenate(entries)
        entries.clear()  # the pieces may be most of the memory in use
        together.sort()
        merged.append(together)
    return PrefixIndex(threshold, *merged)


def neighbours(sets: ShingleSets, index: PrefixIndex, near: np.ndarray, asked: np.ndarray) -> Pairs:
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
    for one, other in ((asked_short, near_short), (asked_short, near_rest), (asked_rest, near_short)):
        shingle, near_node = other >> np.uint64(32), _nodes(other)
        for first in range(0, len(one) if len(other) else 0, PAIRS_AT_ONCE):
            here = one[first : first + PAIRS_AT_ONCE]
            asked_for = here >> np.uint64(32)
            left = np.searchsorted(shingle, asked_for)
            met = shingle[np.minimum(left, len(shingle) - 1)] == asked_for  # true of few
            here, left = here[met], left[met]
            count = np.searchsorted(shingle, asked_for[met], "right") - left
            _search(sets, index.threshold, _nodes(here), near_node, left, count, open_, found)
    one, other, similarity = _joined(found)
    order = np.argsort(one, kind="stable")
    return one[order], other[order], similarity[order]


def _nodes(entries: np.ndarray) -> np.ndarray:
    return (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _joined(found: list[Pairs]) -> Pairs:
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    one, other, similarity = map(np.concatenate, zip(none, *found))
    return one, other, similarity


def _search(
    sets: ShingleSets,
    threshold: float,
    asked: np.ndarray,
    near: np.ndarray,
    left: np.ndarray,
    count: np.ndarray,
    open_: np.ndarray,
    found: list[Pairs],
) -> None:
    """Compares the candidates of each index entry, and appends the pairs that are similar enough to `found`.

    It takes a few candidates of every entry at a time, so that a node which has found a neighbour is not
    compared again: in a large cluster this makes the work linear.

    Args:
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
        keys = distinct((one.astype(np.uint64) << np.uint64(32)) | other.astype(np.uint64))
        one, other = (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        fits = sets.may_reach(one, other, threshold)
        one, other = one[fits], other[fits]
        similarity = sets.similarity(one, other)
        good = similarity >= threshold - 1e-12  # exactly the threshold counts, whatever the rounding
        one, other, similarity = one[good], other[good], similarity[good]
        best = np.lexsort((other, -similarity, one))
        firsts = best[np.unique(one[best], return_index=True)[1]]
        open_[one[firsts]] = False
        found.append((one[firsts], other[firsts], similarity[firsts]))
        step += width


def cluster_of(sets: ShingleSets, index: PrefixIndex, start: np.ndarray, among: np.ndarray) -> Pairs:
    """All nodes connected with the `start` nodes through near-duplicates of near-duplicates.

    Args:
        start, among: Masks over rows (only nodes count); the search goes through `among` and stays in it.

    Returns:
        (node reached, the node it was reached from, their similarity), in the order in which they are
        reached.
    """
    near, asked = start.copy(), among & ~start
    found = []
    while near.any():
        reached = neighbours(sets, index, near, asked)
        found.append(reached)
        near = np.zeros_like(near)
        near[reached[0]] = True
        asked[reached[0]] = False
    return _joined(found)


@dataclass(frozen=True)
class CrossSplitDuplicates:
    """Rows in a cluster with a row that is held out from them, by ascending row.

    Attributes:
        row: The row (int64).
        near: The row that it is a near-duplicate of: in the held-out split, or one link nearer to it.
        similarity: Their Jaccard similarity.
    """

    row: np.ndarray
    near: np.ndarray
    similarity: np.ndarray

    @classmethod
    def none(cls) -> "CrossSplitDuplicates":
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def cross_split_duplicates(sets: ShingleSets, index: PrefixIndex, split: np.ndarray) -> CrossSplitDuplicates:
    """Finds train rows whose cluster reaches a validation or test row, and validation rows whose cluster
    reaches test.

    A cluster is all that is connected by pairs at or above the index's threshold. Without these rows, no
    cluster is left in two splits.

    Args:
        split: Index into SPLITS per row (int8).
    """
    first = _first_rows(sets, split)
    is_node = sets.node == np.arange(len(sets))
    taken = np.zeros(len(sets), bool)
    rows, near, similarity = [], [], []
    for held_out, lower in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
        start = (first[held_out] >= 0) & ~taken
        one, other, found = cluster_of(sets, index, start, is_node & ~taken)
        link, strength = np.full(len(sets), -1), np.ones(len(sets))
        # The neighbour named is a held-out row where its set has one, else any row of it.
        named = np.where(first[held_out] >= 0, first[held_out], np.arange(len(sets)))
        link[one], strength[one] = named[other], found
        link[start] = first[held_out][start]
        taken |= link >= 0
        dropped = np.flatnonzero((link[sets.node] >= 0) & np.isin(split, lower))
        rows.append(dropped)
        near.append(link[sets.node[dropped]])
        similarity.append(strength[sets.node[dropped]])
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    return CrossSplitDuplicates(row[order], np.concatenate(near)[order], np.concatenate(similarity)[order])


def leaked(sets: ShingleSets, index: PrefixIndex, split: np.ndarray) -> dict[str, int]:
    """Held-out rows with a near-duplicate in another split: for validation in train, for test in train or
    validation.

    Args:
        split: Index into SPLITS per row (int8); -1 for a row that is in none.
    """
    first = _first_rows(sets, split)
    found = {}
    for held_out, lower in ((VALIDATION, (TRAIN,)), (TEST, (TRAIN, VALIDATION))):
        near = np.any([first[s] >= 0 for s in lower], axis=0)
        asked = first[held_out] >= 0
        hit = near & asked
        hit[neighbours(sets, index, near, asked & ~near)[0]] = True
        found[SPLITS[held_out]] = int((hit[sets.node] & (split == held_out)).sum())
    return found


def _first_rows(sets: ShingleSets, split: np.ndarray) -> np.ndarray:
    """For each split and node the first row there with the node's set, or -1 (int64 [splits, rows])."""
    first = np.full((len(SPLITS), len(sets)), -1)
    for s in range(len(SPLITS)):
        rows = np.flatnonzero(split == s)[::-1]
        first[s][sets.node[rows]] = rows
    return first

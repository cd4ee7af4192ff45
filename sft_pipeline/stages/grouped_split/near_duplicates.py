"""Pairs of rows whose Jaccard similarity of word 3-grams reaches a threshold, and how far such pairs reach.

The search is exact: an all-pairs set join by prefix filtering (Bayardo, Ma, Srikant 2007; Xiao et al. 2008) instead of
MinHash-LSH, which misses some pairs by chance. Put all shingles into one order, the rarest first. The first shingle
that x and y share, at position i of x, leaves them at most |x| - i in common. So if J(x, y) >= t, it is among the
|x| - ceil(t |x|) + 1 first of each, and among the |x| - ceil(2t/(1+t) |x|) + 1 first of the smaller; few pairs without
that similarity meet there. A bitmap of each set then bounds the overlap from above, and what is left is counted.
Rows with equal sets are one node.

    rows --shingles--> sets on disk --equal sets joined--> nodes --prefixes--> index --rounds--> neighbours
"""

import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sft_pipeline.stages.grouped_split.shingles import distinct, mixed, ranges, shingle_sets

BITS = 256
FREQUENCY_SLOTS = 1 << 22
_SLOT = np.uint32(FREQUENCY_SLOTS - 1)
PAIRS_AT_ONCE = 1 << 20
ELEMENTS_AT_ONCE = 1 << 22
ROWS_AT_ONCE = 1 << 15
THREADS = min(4, os.cpu_count() or 1)


class ShingleSets:
    """The shingle set of every row, kept on disk; per row 32 bytes of bitmap and some 30 bytes more in memory.

    Attributes:
        node: For each row, the index of the first row with an equal set (int64 [rows]).
    """

    def __init__(self, texts: Iterable[pa.Array], folder: Path, threads: int | None = None) -> None:
        """
        Args:
            texts: The rows' texts, batch by batch.
            folder: Scratch space, emptied first; it must outlive the sets.
            threads: Batches shingled at a time, THREADS by default. The result does not depend on it.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._path = folder / "shingles.u32"
        sizes, bitmaps, signatures = (
            [np.zeros(0, np.int64)],
            [np.zeros((0, BITS // 64), np.uint64)],
            [np.zeros(0, np.uint64)],
        )
        frequency = np.zeros(FREQUENCY_SLOTS, np.uint32)
        with self._path.open("wb") as stream:
            for size, hashes, bitmap, signature in _in_order(texts, threads or THREADS):
                hashes.tofile(stream)
                sizes.append(size)
                bitmaps.append(bitmap)
                signatures.append(signature)
                np.add.at(frequency, hashes & _SLOT, np.uint32(1))
        self._rarity = np.minimum(frequency, 0xFFFF).astype(np.uint16)
        self.size = np.concatenate(sizes)
        self._start = np.cumsum(self.size) - self.size
        self._bitmap = np.concatenate(bitmaps)
        self.node = _first_equal(self.size, self._bitmap, np.concatenate(signatures))

    def __len__(self) -> int:
        return len(self.size)

    def _read(self, first: int, last: int) -> np.ndarray:
        """The hashes of the rows [first, last), read from the disk."""
        count = int(self.size[first:last].sum())
        return np.fromfile(self._path, np.uint32, count, offset=4 * int(self._start[first]) if count else 0)

    def index(self, threshold: float) -> "Index":
        """The prefixes of all nodes, by shingle."""
        found: list[list[np.ndarray]] = [[np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]]
        for first in range(0, len(self), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(self))
            size, hashes = self.size[first:last], self._read(first, last)
            row = np.repeat(np.arange(last - first, dtype=np.uint64) << np.uint64(48), size)
            rarity = self._rarity[hashes & _SLOT].astype(np.uint64)
            ordered = row | (rarity << np.uint64(32)) | hashes
            ordered.sort()
            start = np.cumsum(size) - size
            full, short = (
                size - np.ceil(share * size - 1e-9).astype(np.int64) + 1
                for share in (threshold, 2 * threshold / (1 + threshold))
            )
            # An equal row stands for the others.
            stands_alone = self.node[first:last] == np.arange(first, last)
            for entries, at, length in ((found[0], start, short), (found[1], start + short, full - short)):
                taken = ordered[ranges(at, np.where(stands_alone, length, 0))]
                entries.append((taken << np.uint64(32)) | ((taken >> np.uint64(48)) + np.uint64(first)))
        return Index(threshold, *(_sorted(entries) for entries in found))

    def may_reach(self, one: np.ndarray, other: np.ndarray, threshold: float) -> np.ndarray:
        """Whether pairs of rows can be similar enough, by their sizes and bitmaps. Never wrong when it says no."""
        a, b = self.size[one], self.size[other]
        needed = np.ceil(threshold / (1 + threshold) * (a + b) - 1e-9)
        fits = np.minimum(a, b) >= needed
        x, y = self._bitmap[one], self._bitmap[other]
        only_x, only_y = (np.bitwise_count(m).sum(axis=1, dtype=np.int64) for m in (x & ~y, y & ~x))
        return fits & (a - only_x >= needed) & (b - only_y >= needed)

    def similarity(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The exact Jaccard similarity of pairs of rows (float64)."""
        result = np.zeros(len(one))
        elements = self.size[one] + self.size[other]
        hashes = np.memmap(self._path, np.uint32, "r") if elements.any() else np.zeros(0, np.uint32)
        chunk = np.cumsum(elements) // ELEMENTS_AT_ONCE
        for piece in np.split(np.arange(len(one)), np.flatnonzero(np.diff(chunk)) + 1):
            x, y = one[piece], other[piece]
            pair = np.arange(len(piece), dtype=np.uint64) << np.uint64(32)
            keys = np.concatenate(
                [np.repeat(pair, self.size[r]) | hashes[ranges(self._start[r], self.size[r])] for r in (x, y)]
            )
            keys.sort()
            twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
            common = np.bincount(twice.astype(np.int64), minlength=len(piece))
            result[piece] = common / (self.size[x] + self.size[y] - common)
        return result


@dataclass(frozen=True)
class Index:
    """(shingle << 32 | node), sorted (uint64): the short prefix of each node, and the rest of its full prefix."""

    threshold: float
    short: np.ndarray
    rest: np.ndarray


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def neighbours(sets: ShingleSets, index: Index, near: np.ndarray, asked: np.ndarray) -> Pairs:
    """For each asked node that has one, a neighbour among the `near` nodes.

    Args:
        near, asked: Masks over rows (only nodes count), disjoint.

    Returns:
        (asked node, its neighbour, their similarity), by ascending asked node.
    """
    open_ = asked.copy()
    found: list[Pairs] = []
    near_short, near_rest = (_of(part, near) for part in (index.short, index.rest))
    asked_short, asked_rest = (_of(part, asked) for part in (index.short, index.rest))
    for one, other in ((asked_short, near_short), (asked_short, near_rest), (asked_rest, near_short)):
        shingle, near_node = other >> np.uint64(32), _nodes(other)
        for first in range(0, len(one) if len(other) else 0, PAIRS_AT_ONCE):
            here = one[first : first + PAIRS_AT_ONCE]
            asked_for = here >> np.uint64(32)
            left = np.searchsorted(shingle, asked_for)
            met = shingle[np.minimum(left, len(shingle) - 1)] == asked_for  # few are
            here, left = here[met], left[met]
            count = np.searchsorted(shingle, asked_for[met], "right") - left
            _search(sets, index.threshold, _nodes(here), near_node, left, count, open_, found)
    return _sorted_pairs(found, by_node=True)


def _sorted(parts: list[np.ndarray]) -> np.ndarray:
    """The concatenation in ascending order; empties the list, which may be most of the memory in use."""
    together = np.concatenate(parts)
    parts.clear()
    together.sort()
    return together


def _nodes(entries: np.ndarray) -> np.ndarray:
    return (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _of(entries: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return entries[mask[_nodes(entries)]]


def _sorted_pairs(found: list[Pairs], *, by_node: bool) -> Pairs:
    one, other, similarity = (
        np.concatenate(columns)
        for columns in zip((np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)), *found)
    )
    order = np.argsort(one, kind="stable") if by_node else np.arange(len(one))
    return one[order], other[order], similarity[order]


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
    """Goes through the candidates of each index entry, a few of every entry at a time, so that a node which has found a
    neighbour is not asked again: in a large cluster this makes the work linear."""
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
        good = similarity >= threshold - 1e-12
        one, other, similarity = one[good], other[good], similarity[good]
        best = np.lexsort((other, -similarity, one))
        firsts = best[np.unique(one[best], return_index=True)[1]]
        open_[one[firsts]] = False
        found.append((one[firsts], other[firsts], similarity[firsts]))
        step += width


def cluster_of(sets: ShingleSets, index: Index, start: np.ndarray, among: np.ndarray) -> Pairs:
    """Everything that hangs together with the `start` nodes through near-duplicates of near-duplicates.

    Args:
        start, among: Masks over rows (only nodes count); the search goes through `among` and stays in it.

    Returns:
        (node reached, the node it was reached from, their similarity), in the order of reaching.
    """
    near, asked = start.copy(), among & ~start
    found = []
    while near.any():
        reached = neighbours(sets, index, near, asked)
        found.append(reached)
        near = np.zeros_like(near)
        near[reached[0]] = True
        asked[reached[0]] = False
    return _sorted_pairs(found, by_node=False)


Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _in_order(batches: Iterable[pa.Array], threads: int) -> Iterator[Sets]:
    """`_sets` of each batch, in order."""
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Sets]] = deque()
        for batch in batches:
            if len(ahead) > threads:
                yield ahead.popleft().result()
            ahead.append(pool.submit(_sets, batch))
        while ahead:
            yield ahead.popleft().result()


def _sets(texts: pa.Array) -> Sets:
    """Of a batch: sizes, hashes, bitmaps and signatures of its sets."""
    size, hashes = shingle_sets(texts)
    return size, hashes, _bitmaps(size, hashes), _signatures(size, hashes)


def _bitmaps(size: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Which of BITS residues occur in each set (uint64 [n, BITS / 64])."""
    marked = np.zeros(len(size) * BITS, bool)
    marked[np.repeat(np.arange(len(size)) * BITS, size) + hashes % BITS] = True
    return np.packbits(marked).view(np.uint64).reshape(-1, BITS // 64)


def _signatures(size: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """64 bits per set, equal for equal sets (uint64 [n])."""
    if not len(size):
        return np.zeros(0, np.uint64)
    return np.add.reduceat(mixed(hashes * np.uint64(0x9E3779B97F4A7C15)), np.cumsum(size) - size)


def _first_equal(size: np.ndarray, bitmaps: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """For each row the first row with the same set: the same size, bitmap and signature."""
    order = np.argsort(signatures, kind="stable")
    new = np.ones(len(order), bool)
    one, other = order[1:], order[:-1]
    new[1:] = (
        (signatures[one] != signatures[other])
        | (size[one] != size[other])
        | (bitmaps[one] != bitmaps[other]).any(axis=1)
    )
    first = np.empty_like(order)
    first[order] = order[new][np.cumsum(new) - 1]
    return first

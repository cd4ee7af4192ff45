"""What is known of every row without reading its set: the prefixes by which rows meet, and bitmaps.

Put all shingles into one order, the rarest first. The first shingle that x and y share, at position i of x,
leaves them at most |x| - i in common. So if their similarity reaches t, it is among the |x| - ceil(t |x|) + 1
first of each (the full prefix), and among the |x| - ceil(2t/(1+t) |x|) + 1 first of the smaller (the short
one). A bitmap of each row's rarest shingles bounds from above what two rows that meet have in common.
"""

from dataclasses import dataclass

import numpy as np

from sft_pipeline.stages.grouped_split.shingles import ShingleSets, ranges

ROWS_AT_ONCE = 1 << 15
BITS = 512  # of a bitmap
RAREST = 128  # shingles of a row in its bitmap, at most


@dataclass(frozen=True)
class PrefixIndex:
    """What is known of every node without reading its set.

    Attributes:
        short, rest: (shingle << 32 | node), sorted (uint64): each node's short prefix, and the rest of its
            full prefix.
        bitmap: uint64 [rows, BITS / 64], residues of each row's rarest shingles.
        cut: uint64 [rows], the place in the order of all shingles up to which a row's are in its bitmap.
        most_common: float32 [rows], the row's shingles less the bits of its bitmap: with the bits that it
            shares with another row, a bound on what the two have in common.
        size: float32 [rows], shingles of each row.
        slack: What rounding may take from a bound, in shingles.
    """

    threshold: float
    short: np.ndarray
    rest: np.ndarray
    bitmap: np.ndarray
    cut: np.ndarray
    most_common: np.ndarray
    size: np.ndarray
    slack: float

    def may_reach(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether pairs of rows can be similar enough. False is always right.

        A shingle of x that comes before y's cut is in y's bitmap if it is in y. So each bit of x alone stands
        for a shingle of x alone, where x has the lower cut; else the other way round.

        Args:
            one, other: Rows, of shapes that broadcast.
        """
        shared = np.zeros(np.broadcast_shapes(one.shape, other.shape), np.uint8)  # RAREST at most
        for word in range(BITS // 64):
            shared += np.bitwise_count(self.bitmap[one, word] & self.bitmap[other, word])
        share = np.float32(self.threshold / (1 + self.threshold))
        by_one = self.size[one] * share - self.most_common[one] + self.size[other] * share
        by_other = self.size[one] * share + (self.size[other] * share - self.most_common[other])
        needed = np.where(self.cut[one] <= self.cut[other], by_one, by_other)
        return shared >= needed - np.float32(self.slack)


def prefix_index(sets: ShingleSets, threshold: float) -> PrefixIndex:
    """The prefixes of all nodes, by shingle, and the bitmaps of their rarest shingles."""
    found: list[list[np.ndarray]] = [[np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]]
    bitmap, cut = np.zeros((len(sets), BITS // 64), np.uint64), np.zeros(len(sets), np.uint64)
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
        bitmap[first:last], cut[first:last] = _rarest(ordered, start, size, short)
        # An equal row stands for the others.
        stands_alone = sets.node[first:last] == np.arange(first, last)
        for entries, at, length in ((found[0], start, short), (found[1], start + short, full - short)):
            taken = ordered[ranges(at, np.where(stands_alone, length, 0))]
            entries.append((taken << np.uint64(32)) | ((taken >> np.uint64(48)) + np.uint64(first)))
    prefixes = []
    for entries in found:
        together = np.concatenate(entries)
        entries.clear()  # the pieces may be most of the memory in use
        together.sort()
        prefixes.append(together)
    bits = np.bitwise_count(bitmap).sum(axis=1, dtype=np.int64)
    sizes = sets.size.astype(np.float32)
    most_common = sizes - bits.astype(np.float32)
    slack = 0.01 + 1e-6 * float(sizes.max(initial=0))  # a few roundings of float32
    return PrefixIndex(threshold, prefixes[0], prefixes[1], bitmap, cut, most_common, sizes, slack)


def _rarest(
    ordered: np.ndarray, start: np.ndarray, size: np.ndarray, short: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bitmaps of the rarest shingles of some rows, and their cuts.

    Shingles that are many times as frequent as those of the short prefix are in most rows that meet there,
    tell nothing apart, and would only fill the bitmap.

    Args:
        ordered: Their shingles as (row << 48 | rarity << 32 | hash), sorted.
        start, size, short: Of each row: where it begins, its shingles, and how many are in its short prefix.
    """
    rarity = (ordered >> np.uint64(32)).astype(np.uint16)
    limit = 8 * rarity[start + short - 1].astype(np.int64)
    rare = np.add.reduceat(rarity <= np.repeat(limit, size), start, dtype=np.int64)
    kept = np.minimum(np.maximum(rare, short), RAREST)
    taken = ordered[ranges(start, kept)]
    marked = np.zeros(len(size) * BITS, bool)
    marked[np.repeat(np.arange(len(size)) * BITS, kept) + (taken % np.uint64(BITS)).astype(np.int64)] = True
    whole = kept == size
    following = ordered[np.where(whole, 0, start + kept)] & np.uint64((1 << 48) - 1)
    cut = np.where(whole, np.uint64(1 << 48), following)
    return np.packbits(marked).view(np.uint64).reshape(-1, BITS // 64), cut

"""Whole examples packed into blocks: best-fit-decreasing, planned on the histogram of lengths, or better.

Best-fit-decreasing puts each example, the longest first, into the fullest block that still has room for it,
or into a new one. Examples of equal length are interchangeable, and so are blocks of equal remaining room; so
the plan is made for (length, how many) and (room, how many), in time that depends on the number of different
lengths and not on the number of examples. The number of blocks is exactly that of the example-by-example
algorithm.

    lengths 5 5 3 3 2, block 8   ->   [5 3] [5 3] [2]

It is at its weakest where a block holds few examples of much the same length: 1.8 % above the lower bound for
GSM8K in blocks of 1,024, 3 % in blocks of 512. `exact_fill` then looks for a plan with fewer blocks, as in
the cutting-stock problem: a pattern is found for one long example at a time, the examples that fill the rest
of its block exactly, preferring lengths of which there are many, so that what is left over stays varied. A
pattern is used for as many blocks as the stock allows, so the time again depends on the number of different
lengths. It is a heuristic, and its plan is taken only where that has fewer blocks.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Pattern = tuple[tuple[int, int], ...]
"""What a block holds: ((length, how many), ...), longest first."""

CLOSE = 0.002  # a plan this near the lower bound, as a share of it, is not improved
# In mean lengths of room: with more than this the longest example that fits is taken; with less the rest of
# the block is planned at once.
FAR = 3.5
LOOSE = 200  # at most the 200th part of a block is left empty by a pattern
MOST_WORK = 30_000_000  # array elements read: a tenth of a second or two


@dataclass(frozen=True)
class Packing:
    """Which examples form each block.

    Attributes:
        order: int64 (examples,): example indices, block after block.
        starts: int64 (blocks + 1,): block b holds order[starts[b]:starts[b + 1]].
    """

    order: Ints
    starts: Ints

    @property
    def blocks(self) -> int:
        return len(self.starts) - 1

    def sums(self, values: npt.NDArray) -> npt.NDArray:
        """Per block, the sum of a value per example (tokens, weights, ...): int64 or float64."""
        wide = np.float64 if values.dtype.kind == "f" else np.int64
        if not self.blocks:
            return np.empty(0, dtype=wide)
        return np.add.reduceat(values[self.order].astype(wide), self.starts[:-1])


def pack(lengths: Ints, max_length: int, strategy: str, seed: int = 0) -> Packing:
    """Plans the blocks.

    Args:
        lengths: Tokens per example (examples,), each from 1 to `max_length`.
        max_length: Tokens that a block can hold.
        strategy: "bfd": never more blocks than best-fit-decreasing; or "none": one example per block, in the
            order given.
        seed: Which of several examples of equal length goes where. Another seed changes no block's fill.

    Raises:
        ValueError: An example does not fit into a block.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= max_length:
        raise ValueError(
            f"examples of {int(lengths.min())} to {int(lengths.max())} tokens do not fit into blocks of "
            f"{max_length}"
        )
    if strategy == "none":
        return Packing(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    if strategy != "bfd":
        raise ValueError(f"unknown packing strategy {strategy!r}")
    histogram = np.bincount(lengths, minlength=max_length + 1)
    patterns = plan_patterns(histogram, max_length)
    better = exact_fill(histogram, max_length, most=sum(count for _, count in patterns))
    return _assign(lengths, better or patterns, seed)


def plan_patterns(histogram: Ints, max_length: int) -> list[tuple[Pattern, int]]:
    """Best-fit-decreasing on (length -> how many examples); gives patterns and how many blocks have each."""
    # room -> blocks with exactly that much room left, by pattern; `rooms` are its keys, ascending
    open_blocks: dict[int, list[tuple[Pattern, int]]] = {}
    rooms: list[int] = []

    def put(room: int, pattern: Pattern, count: int) -> None:
        if room not in open_blocks:
            open_blocks[room] = []
            insort(rooms, room)
        open_blocks[room].append((pattern, count))

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left and (at := bisect_left(rooms, length)) < len(rooms):
            # The fullest blocks with room for one. Such a block takes examples for as long as there is room:
            # after each of them it is still the fullest one that fits.
            room = rooms.pop(at)
            each = room // length
            for pattern, count in open_blocks.pop(room):
                full = min(count, left // each)
                if full:
                    put(room - each * length, (*pattern, (length, each)), full)
                left -= full * each
                rest = count - full
                if rest and left:  # fewer examples are left than one more block would take
                    put(room - left * length, (*pattern, (length, left)), 1)
                    left, rest = 0, rest - 1
                if rest:
                    put(room, pattern, rest)
        each = max_length // length
        if left // each:
            put(max_length - each * length, ((length, each),), left // each)
        if left % each:
            put(max_length - (left % each) * length, ((length, left % each),), 1)
    return [entry for room in rooms for entry in open_blocks[room]]


def _assign(lengths: Ints, patterns: list[tuple[Pattern, int]], seed: int) -> Packing:
    """Assigns the examples to the planned blocks.

    Which of several examples of equal length goes where is shuffled: otherwise neighbours in the source would
        always
    share a block.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    # NumPy sorts 16-bit integers by radix, which is several times faster than its sort of longer ones.
    small = lengths[shuffled].astype(np.uint16 if len(lengths) and int(lengths.max()) < 65_536 else np.int64)
    by_length = shuffled[np.argsort(small, kind="stable")]
    ends = np.cumsum(np.bincount(lengths)) if len(lengths) else np.empty(0, dtype=np.int64)
    taken = ends - np.bincount(lengths) if len(lengths) else ends  # where the examples of each length begin
    members, sizes = [], []
    for pattern, count in patterns:
        columns = []
        for length, each in pattern:
            first = int(taken[length])
            taken[length] += count * each
            columns.append(by_length[first : first + count * each].reshape(count, each))
        together = np.concatenate(columns, axis=1)
        members.append(together.ravel())
        sizes.append(np.full(count, together.shape[1]))
    order = np.concatenate(members) if members else np.empty(0, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]) if sizes else np.zeros(1, dtype=np.int64)
    return Packing(order, starts)


def lower_bound(histogram: Ints, max_length: int) -> int:
    """Blocks that no plan can do without: enough for all tokens, and one for each example over half a
    block.
    """
    tokens = int(histogram @ np.arange(len(histogram)))
    return max(-(-tokens // max_length), int(histogram[max_length // 2 + 1 :].sum()))


def exact_fill(histogram: Ints, max_length: int, most: int) -> list[tuple[Pattern, int]] | None:
    """A plan with fewer than `most` blocks, if one is found.

    Args:
        histogram: How many examples there are of each length (max_length + 1,).
        most: The blocks of the plan that is to be beaten.

    Returns:
        Patterns and how many blocks have each, or None.
    """
    enough = lower_bound(histogram, max_length) * (1 + CLOSE)
    found = None
    # Two variants of the search, as neither is the better one on all data.
    for every_other, share in ((False, 1), (True, 3)):
        if most <= enough:
            break
        if plan := _Stock(histogram, max_length).plan(every_other, share, most):
            found, most = plan, sum(count for _, count in plan)
    return found


class _Stock:
    """The examples that are not in a block yet, by length."""

    def __init__(self, histogram: Ints, max_length: int) -> None:
        self.counts = histogram.astype(np.int64)
        self.max_length = max_length
        self.rows = int(self.counts.sum())
        self.tokens = int(self.counts @ np.arange(len(self.counts)))
        self.work = 0

    def plan(self, every_other: bool, share: int, most: int) -> list[tuple[Pattern, int]] | None:
        """Uses up the stock in fewer than `most` blocks; None where that fails, or takes too long.

        Args:
            every_other: Begin every other pattern with the most frequent length instead of the longest.
            share: Use a pattern for this part of the blocks that it could make.
        """
        made: list[tuple[Pattern, int]] = []
        blocks = 0
        while self.rows:
            longest = self._longest(self.max_length)
            frequent = every_other and len(made) % 2 == 0
            members = self._members(int(self.counts.argmax()) if frequent else longest)
            lengths, each = np.unique(members, return_counts=True)
            times = max(1, int((self.counts[lengths] // each).min()) // share)
            self.counts[lengths] -= each * times
            self.rows -= int(each.sum()) * times
            self.tokens -= int(each @ lengths) * times
            made.append((tuple(zip(lengths[::-1].tolist(), each[::-1].tolist())), times))
            blocks += times
            if self.work > MOST_WORK or blocks - self.tokens // -self.max_length >= most:
                return None
        return made

    def _members(self, first: int) -> list[int]:
        """The lengths of one block that begins with an example of length `first`; the stock is left as it
        was.
        """
        mean = self.tokens / self.rows
        members: list[int] = []
        rest: list[int] | None = None
        room, length = self.max_length, first
        while length:
            members.append(length)
            self.counts[length] -= 1
            room -= length
            rest = self._filling(room, mean) if room <= FAR * mean else None
            length = self._longest(room) if rest is None else 0
        np.add.at(self.counts, members, 1)
        return members + (rest or [])

    def _longest(self, room: int) -> int:
        """The longest example that fits, or 0."""
        self.work += room
        fitting = np.flatnonzero(self.counts[: room + 1])
        return int(fitting[-1]) if len(fitting) else 0

    def _filling(self, room: int, mean: float) -> list[int] | None:
        """One to three lengths that fill the room, or nearly: those with the most stock; None if none do."""
        for total in range(room, max(room - max(self.max_length // LOOSE, 2), 0), -1):
            options = [(int(self.counts[total]), [total]), self._pair(total)]
            if total > 2.5 * mean or not any(supply for supply, _ in options):
                options.append(self._triple(total))
            supply, lengths = max(options, key=lambda option: option[0])
            if supply:
                return lengths
        return None if room else []

    def _pair(self, total: int) -> tuple[int, list[int]]:
        """The two lengths with this sum of which there are most: (how many such pairs, the lengths)."""
        self.work += total
        if total < 2:
            return 0, []
        pairs = np.minimum(self.counts[1:total], self.counts[total - 1 : 0 : -1])
        if total % 2 == 0:
            pairs[total // 2 - 1] //= 2  # a length with itself
        one = int(pairs.argmax()) + 1
        return int(pairs[one - 1]), [one, total - one]

    def _triple(self, total: int) -> tuple[int, list[int]]:
        """The most frequent length around a third of this sum, and a pair for the rest."""
        low, high = int(0.2 * total), int(0.47 * total)
        if low < 1 or high <= low:
            return 0, []
        one = low + int(self.counts[low : high + 1].argmax())
        if not self.counts[one]:
            return 0, []
        self.counts[one] -= 1
        supply, pair = self._pair(total - one)
        self.counts[one] += 1
        return supply, [one, *pair]

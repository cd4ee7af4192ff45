"""Whole examples packed into blocks: best-fit-decreasing, planned on the histogram of lengths, or better.

Best-fit-decreasing puts each example, the longest first, into the fullest block that still has room for it, or into
a new one. Examples of equal length are interchangeable, and so are blocks of equal remaining room; so the plan is made
for (length, how many) and (room, how many), in time that depends on the number of different lengths and not on the
number of examples. The number of blocks is exactly that of the example-by-example algorithm. Where that is not close
to the lower bound, `exact_fill` looks for a plan with fewer.

    lengths 5 5 3 3 2, block 8   ->   [5 3] [5 3] [2]
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sft_pipeline.stages.packed_shards.exact_fill import Pattern, exact_fill

Ints = npt.NDArray[np.integer]


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

    def examples(self, block: int) -> Ints:
        """Indices of the examples in one block, in their order within it."""
        return self.order[self.starts[block] : self.starts[block + 1]]

    def sums(self, values: Ints) -> Ints:
        """Per block, the sum of a value per example (tokens, supervised tokens)."""
        if not self.blocks:
            return np.empty(0, dtype=np.int64)
        return np.add.reduceat(values[self.order].astype(np.int64), self.starts[:-1])


def pack(lengths: Ints, max_length: int, strategy: str, seed: int = 0) -> Packing:
    """Plans the blocks.

    Args:
        lengths: Tokens per example (examples,), each from 1 to `max_length`.
        max_length: Tokens that a block can hold.
        strategy: "bfd": never more blocks than best-fit-decreasing; or "none": one example per block, in the order given.
        seed: Which of several examples of equal length goes where. Another seed changes no block's fill.

    Raises:
        ValueError: An example does not fit into a block.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= max_length:
        raise ValueError(
            f"examples of {int(lengths.min())} to {int(lengths.max())} tokens do not fit into blocks of {max_length}"
        )
    if strategy == "none":
        return Packing(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    if strategy != "bfd":
        raise ValueError(f"unknown packing strategy {strategy!r}")
    histogram = np.bincount(lengths, minlength=max_length + 1)
    patterns = plan_patterns(histogram, max_length)
    better = exact_fill(histogram, max_length, most=sum(count for _, count in patterns))
    return _deal(lengths, better or patterns, seed)


def plan_patterns(histogram: Ints, max_length: int) -> list[tuple[Pattern, int]]:
    """Best-fit-decreasing on (length -> how many examples); gives patterns and how many blocks have each."""
    open_blocks: dict[
        int, list[tuple[Pattern, int]]
    ] = {}  # room -> blocks with exactly that much, by pattern
    rooms: list[int] = []  # the keys of open_blocks, ascending

    def put(room: int, pattern: Pattern, count: int) -> None:
        if room not in open_blocks:
            open_blocks[room] = []
            insort(rooms, room)
        open_blocks[room].append((pattern, count))

    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left and (at := bisect_left(rooms, length)) < len(rooms):
            # The fullest blocks with room for one. Such a block takes examples for as long as there is room: after
            # each of them it is still the fullest one that fits.
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


def _deal(lengths: Ints, patterns: list[tuple[Pattern, int]], seed: int) -> Packing:
    """Deals the examples to the planned blocks. Which of equal length goes where is shuffled, or neighbours in the
    source would always share a block."""
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    small = lengths[shuffled].astype(
        np.uint16 if len(lengths) and int(lengths.max()) < 65_536 else np.int64
    )  # 16 bits sort by radix
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

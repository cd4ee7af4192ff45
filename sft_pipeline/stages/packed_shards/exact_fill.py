"""Blocks filled to the last token, where best-fit-decreasing leaves room at the end of most.

Best-fit-decreasing is at its weakest where a block holds few examples of much the same length: 1.8 % above the lower
bound for GSM8K in blocks of 1,024, 3 % in blocks of 512. A cutting-stock pattern is then found for one long example at
a time: the examples that fill the rest of its block exactly, preferring lengths of which there are many, so that what
is left over stays varied. A pattern is used for as many blocks as the stock allows, so the time depends on the number
of different lengths. It is a heuristic: `packing` takes its plan only where that has fewer blocks.
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Pattern = tuple[tuple[int, int], ...]
"""What a block holds: ((length, how many), ...), longest first."""

CLOSE = 0.002  # a plan this near the lower bound, as a share of it, is not improved
FAR = 3.5  # mean lengths of room from which the longest example that fits is taken; nearer, the rest is planned at once
LOOSE = 200  # at most the 200th part of a block is left empty by a pattern
MOST_WORK = 30_000_000  # array elements looked at: a tenth of a second or two


def lower_bound(histogram: Ints, max_length: int) -> int:
    """Blocks that no plan can do without: those of the tokens, and one for each example of more than half a block."""
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
    # Two ways to go about it: neither is the better one on all data.
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
        """The lengths of one block that begins with an example of length `first`; the stock is left as it was."""
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
        """One to three lengths that fill the room, or nearly; the best supplied of those found. None: there are none."""
        for total in range(room, max(room - max(self.max_length // LOOSE, 2), 0), -1):
            options = [(int(self.counts[total]), [total]), self._pair(total)]
            if total > 2.5 * mean or not any(supply for supply, _ in options):
                options.append(self._triple(total))
            supply, lengths = max(options, key=lambda option: option[0])
            if supply:
                return lengths
        return None if room else []

    def _pair(self, total: int) -> tuple[int, list[int]]:
        """The two lengths of this sum of which there are most: (how many such pairs, the lengths)."""
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

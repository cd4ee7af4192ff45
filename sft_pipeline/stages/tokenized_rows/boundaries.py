r"""Between which two characters a regular expression that cuts text is certain to cut, whatever stands around them.

A pattern's matches are its pieces. Two neighbouring characters can be in one piece only if the pattern lets the second
follow the first, which its syntax tree tells (the follow sets of Glushkov, "The abstract theory of automata", 1961).
Between all other pairs there is a cut, and what lies between two such cuts is cut alike alone and within its text:
a match neither crosses the cut nor looks across it. (A lookahead counts as text that follows: `\s+(?!\S)` looks at what
comes behind white space, so white space is never certain to end a piece.)
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

import numpy as np
import numpy.typing as npt

PAIRWISE = ("[0-9]|[^0-9]+", "[0-9]+|[^0-9]+")
"""Patterns whose cuts depend on nothing but the two characters: a further pattern's certain cuts hold behind them."""

_ALL = (1 << 128) - 1


def may_share_a_piece(patterns: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """For ASCII characters a, b: whether a piece may contain ab; where not, there is always a cut.

    Args:
        patterns: For Python's `re` with re.ASCII; each cuts what the one before it has left, and covers all of it.

    Returns:
        bool (128, 128); None where that cannot be told.
    """
    found = np.ones((128, 128), dtype=bool)
    for pattern in patterns:
        pairs = _Pairs()
        try:
            parsed = sre_parser.parse(pattern, re.ASCII)
            pairs.sequence(parsed, fold=bool(parsed.state.flags & re.IGNORECASE))
        except (_Unknown, re.error):
            return None if found.all() else found
        found &= np.array([[mask >> b & 1 for b in range(128)] for mask in pairs.follow], dtype=bool)
        if pattern not in PAIRWISE:
            break
    return found


class _Unknown(Exception):
    """The pattern has something whose reach is not known, such as a look behind."""


@dataclass(frozen=True)
class _Ends:
    """The characters (bit sets) with which a part of a pattern can begin and end, and whether it can match nothing."""

    first: int
    last: int
    empty: bool


class _Pairs:
    """Gathers which characters (bit sets) can follow which within a match."""

    def __init__(self) -> None:
        self.follow = [0] * 128

    def _join(self, last: int, first: int) -> None:
        for a in range(128):
            if last >> a & 1:
                self.follow[a] |= first

    def sequence(self, items: Iterable[tuple[Any, Any]], *, fold: bool) -> _Ends:
        whole = _Ends(0, 0, True)
        for operation, argument in items:
            if operation in (sre.ASSERT, sre.ASSERT_NOT):
                direction, inner = argument
                if direction < 0:
                    raise _Unknown
                self._join(whole.last, self.sequence(inner, fold=fold).first)
                continue
            part = self._part(operation, argument, fold)
            self._join(whole.last, part.first)
            whole = _Ends(
                whole.first | (part.first if whole.empty else 0),
                part.last | (whole.last if part.empty else 0),
                whole.empty and part.empty,
            )
        return whole

    def _part(self, operation: Any, argument: Any, fold: bool) -> _Ends:
        if operation is sre.BRANCH:
            either = [self.sequence(branch, fold=fold) for branch in argument[1]]
            return _Ends(
                _union(e.first for e in either), _union(e.last for e in either), any(e.empty for e in either)
            )
        if operation is sre.SUBPATTERN:
            _, added, _, inner = argument
            return self.sequence(inner, fold=fold or bool(added & re.IGNORECASE))
        if operation is sre.ATOMIC_GROUP:
            return self.sequence(argument, fold=fold)
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            least, most, inner = argument
            ends = self.sequence(inner, fold=fold)
            if most > 1:
                self._join(ends.last, ends.first)
            return _Ends(ends.first, ends.last, ends.empty or least == 0)
        members = _members(operation, argument)
        if fold:
            members |= _union(1 << ord(s) for c in range(128) if members >> c & 1 for s in chr(c).swapcase() if ord(s) < 128)  # fmt: skip
        return _Ends(members, members, False)


def _members(operation: Any, argument: Any) -> int:
    """The ASCII characters that one character of a pattern stands for."""
    if operation is sre.LITERAL:
        return 1 << argument if argument < 128 else 0
    if operation is sre.NOT_LITERAL:
        return _ALL & ~_members(sre.LITERAL, argument)
    if operation is sre.ANY:
        return _ALL
    if operation is sre.RANGE:
        low, high = argument
        return _union(1 << c for c in range(low, min(high, 127) + 1))
    if operation is sre.CATEGORY:
        return _CATEGORIES[argument]
    if operation is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        members = _union(_members(*item) for item in argument[negated:])
        return _ALL & ~members if negated else members
    raise _Unknown


def _union(sets: Iterable[int]) -> int:
    found = 0
    for members in sets:
        found |= members
    return found


def _matched(pattern: str) -> int:
    return _union(1 << c for c in range(128) if re.match(pattern, chr(c), re.ASCII))


_CATEGORIES = {
    sre.CATEGORY_DIGIT: _matched(r"\d"), sre.CATEGORY_NOT_DIGIT: _matched(r"\D"),
    sre.CATEGORY_SPACE: _matched(r"\s"), sre.CATEGORY_NOT_SPACE: _matched(r"\S"),
    sre.CATEGORY_WORD: _matched(r"\w"), sre.CATEGORY_NOT_WORD: _matched(r"\W"),
}  # fmt: skip

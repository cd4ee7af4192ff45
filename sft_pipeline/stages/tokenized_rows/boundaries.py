r"""Between which two characters a regular expression that cuts text is certain to cut, whatever stands around them.

A pattern's matches are its pieces. Two neighbouring characters can be in one piece only if the pattern lets the second
follow the first, which its syntax tree tells (the follow sets of Glushkov, "The abstract theory of automata", 1961).
Between all other pairs there is a cut, and what lies between two such cuts is cut alike alone and within its text:
a match neither crosses the cut nor looks across it. (A lookahead counts as text that follows: `\s+(?!\S)` looks at what
comes behind white space, so white space is never certain to end a piece.)
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

import numpy as np
import numpy.typing as npt

_ALL = (1 << 128) - 1


def may_share_a_piece(patterns: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """For ASCII characters a, b: whether a piece may contain ab; where not, there is always a cut.

    Args:
        patterns: For Python's `re` with re.ASCII; each cuts what the one before it has left, and covers all of it.

    Returns:
        bool (128, 128); None where that cannot be told.
    """
    found = np.ones((128, 128), dtype=bool)
    # What an earlier pattern cuts by counting characters: no further cut may come between these.
    kept = np.zeros((128, 128), dtype=bool)
    for pattern in patterns:
        pairs = _Pairs()
        try:
            parsed = sre_parser.parse(pattern, re.ASCII)
            pairs.sequence(parsed, fold=bool(parsed.state.flags & re.IGNORECASE))
        except (_Unknown, re.error):
            return None if found.all() else found
        found &= kept | np.array([_flags(mask) for mask in pairs.follow])
        counted = _counted(parsed)
        if counted is None:
            break
        kept |= np.outer(_flags(counted), _flags(counted))
    return found


def _counted(parsed: Any) -> int | None:
    """Of a pattern that is a choice of runs of disjoint sets, such as `\\d{1,3}|[^0-9]+`: those whose runs have a limit.

    Only behind such a pattern do the certain cuts of the next one hold: a cut within an unlimited run changes nothing
    that this pattern does elsewhere. None for others.
    """
    if parsed.state.flags & re.IGNORECASE:
        return None
    seen = counted = 0
    for branch in parsed[0][1][1] if parsed[0][0] is sre.BRANCH and len(parsed) == 1 else [parsed]:
        ((operation, argument), *more) = branch
        least, most = 1, 1
        if operation is sre.MAX_REPEAT and len(argument[2]) == 1:
            least, most, ((operation, argument),) = argument
        if more or least != 1 or operation not in _ONE_CHARACTER or seen & _members(operation, argument):
            return None
        seen |= _members(operation, argument)
        counted |= _members(operation, argument) if most is not sre.MAXREPEAT else 0
    return counted


def covering(pattern: str) -> str:
    """The pattern, with what lies between its matches as matches too, so that it covers all ASCII text.

    Raises:
        re.error: It is not one of Python's.
    """
    pairs = _Pairs()
    try:
        ends = pairs.sequence(sre_parser.parse(pattern, re.ASCII), fold=False)
    except _Unknown:
        return f"{pattern}|(?:(?!{pattern})[\\s\\S])+"
    if ends.alone == _ALL:
        return pattern
    # What matches whatever comes behind it is never between matches, and nothing else may begin one in between.
    between = "[" + "".join(re.escape(chr(c)) for c in range(128) if not ends.alone >> c & 1) + "]"
    return (
        f"{pattern}|{between}+" if not ends.first & ~ends.alone else f"{pattern}|(?:(?!{pattern}){between})+"
    )


class _Unknown(Exception):
    """The pattern has something whose reach is not known, such as a look behind."""


@dataclass(frozen=True)
class _Ends:
    """What a part of a pattern can match.

    Attributes:
        first, last: The characters (bit sets) with which it can begin and end.
        empty: Whether it can match nothing.
        alone: Those that it matches by themselves, whatever comes behind.
    """

    first: int
    last: int
    empty: bool
    alone: int


class _Pairs:
    """Gathers which characters (bit sets) can follow which within a match."""

    def __init__(self) -> None:
        self.follow = [0] * 128

    def _join(self, last: int, first: int) -> None:
        for a in range(128):
            if last >> a & 1:
                self.follow[a] |= first

    def sequence(self, items: Iterable[tuple[Any, Any]], *, fold: bool) -> _Ends:
        whole, looks_on = _Ends(0, 0, True, 0), False
        for operation, argument in items:
            if operation in (sre.ASSERT, sre.ASSERT_NOT):
                direction, inner = argument
                if direction < 0:
                    raise _Unknown
                self._join(whole.last, self.sequence(inner, fold=fold).first)
                looks_on = True
                continue
            part = self._part(operation, argument, fold)
            self._join(whole.last, part.first)
            whole = _Ends(
                whole.first | (part.first if whole.empty else 0),
                part.last | (whole.last if part.empty else 0),
                whole.empty and part.empty,
                (part.alone if whole.empty else 0) | (whole.alone if part.empty else 0),
            )
        return replace(whole, alone=0) if looks_on else whole

    def _part(self, operation: Any, argument: Any, fold: bool) -> _Ends:
        if operation is sre.BRANCH:
            either = [self.sequence(branch, fold=fold) for branch in argument[1]]
            return _Ends(
                _union(e.first for e in either),
                _union(e.last for e in either),
                any(e.empty for e in either),
                _union(e.alone for e in either),
            )
        if operation is sre.SUBPATTERN:
            _, added, _, inner = argument
            return self.sequence(inner, fold=fold or bool(added & re.IGNORECASE))
        if operation is sre.ATOMIC_GROUP:
            return replace(self.sequence(argument, fold=fold), alone=0)
        if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT):
            least, most, inner = argument
            ends = self.sequence(inner, fold=fold)
            if most > 1:
                self._join(ends.last, ends.first)
            alone = ends.alone if least <= 1 and operation is not sre.POSSESSIVE_REPEAT else 0
            return _Ends(ends.first, ends.last, ends.empty or least == 0, alone)
        members = _members(operation, argument)
        if fold:
            members |= _union(
                1 << ord(s) for c in range(128) if members >> c & 1 for s in chr(c).swapcase() if ord(s) < 128
            )
        return _Ends(members, members, False, members)


_ONE_CHARACTER = (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN)


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


def _flags(members: int) -> npt.NDArray[np.bool_]:
    return np.array([members >> c & 1 for c in range(128)], dtype=bool)


def _union(sets: Iterable[int]) -> int:
    found = 0
    for members in sets:
        found |= members
    return found


def _matched(pattern: str) -> int:
    return _union(1 << c for c in range(128) if re.match(pattern, chr(c), re.ASCII))


_CATEGORIES = {
    sre.CATEGORY_DIGIT: _matched(r"\d"),
    sre.CATEGORY_NOT_DIGIT: _matched(r"\D"),
    sre.CATEGORY_SPACE: _matched(r"\s"),
    sre.CATEGORY_NOT_SPACE: _matched(r"\S"),
    sre.CATEGORY_WORD: _matched(r"\w"),
    sre.CATEGORY_NOT_WORD: _matched(r"\W"),
}

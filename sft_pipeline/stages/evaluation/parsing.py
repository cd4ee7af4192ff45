"""Reading replies: strict JSON, and numbers as people write them."""

import json
import math
import re
from typing import Any


class Unparsable(ValueError):
    """The text is not JSON in the sense of RFC 8259 with unique keys."""


class _Missing:
    def __repr__(self) -> str:
        return "absent"


MISSING = _Missing()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        raise Unparsable(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise Unparsable(f"{name} is not JSON")


def parse_json(text: str) -> Any:
    """The value of a JSON text; surrounding white space is allowed, anything else around it is not.

    Raises:
        Unparsable: Not JSON, a repeated key, NaN or Infinity, or nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except Unparsable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unparsable(str(error) or type(error).__name__) from error


def field_of(value: Any, name: str) -> Any:
    """A field of an object by its name, or by a dotted path (`subject.id`) where no key has that very name."""
    if isinstance(value, dict) and name in value:
        return value[name]
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def json_equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0 but not true, at any depth."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(json_equal(x, y) for x, y in zip(a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    return type(a) is type(b) and a == b


# Digits with thousands commas, or plain, with a decimal part; not from the middle of a longer number.
_DIGITS = (
    r"(?:(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][-+]?\d+(?!\w))?|(?<!\d)\.\d+)"
)
# A minus is a sign unless it follows a digit, a letter or a closing bracket ("10-5", "T-5").
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+]\s?)?(?P<unit>[$€£¥]\s?)?(?P<sign2>(?<=[$€£¥])-)?"
    rf"(?:(?P<whole>\d+)\s+(?P<top>\d+)/(?P<bottom>\d+)|(?P<top2>\d+)/(?P<bottom2>\d+)(?!\d*/)|(?P<number>{_DIGITS}))"
)


def _value(match: re.Match[str]) -> float | None:
    parts = match.groupdict()
    if parts["number"] is not None:
        value = float(parts["number"].replace(",", ""))
    else:
        bottom = int(parts["bottom"] or parts["bottom2"])
        if bottom == 0:
            return None
        value = int(parts["whole"] or 0) + int(parts["top"] or parts["top2"]) / bottom
    negative = (parts["sign"] or "").strip() == "-" or parts["sign2"] is not None
    if not math.isfinite(value):
        return None
    return -value if negative else value


def numbers(text: str) -> list[float]:
    """The numbers of a text in order: `-1,234.5`, `$18`, `3/4`, `2 1/2`, `1e3`, `40%` (a unit: 40)."""
    found = (_value(m) for m in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-")))
    return [v for v in found if v is not None]


def last_number(text: str) -> float | None:
    found = numbers(text)
    return found[-1] if found else None


def first_number_after(text: str, mark: str) -> float | None:
    """The first number after the last occurrence of `mark`; None where either is absent."""
    _, there, tail = text.rpartition(mark)
    found = numbers(tail) if there else []
    return found[0] if found else None

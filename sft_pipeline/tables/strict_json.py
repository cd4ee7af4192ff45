"""Strict JSON: a value from text, or the reason why there is none, and the canonical form that names it.

Canonical JSON is what orjson writes (keys sorted), and what Python's encoder writes where orjson cannot hold
the value (whole numbers beyond 64 bits): a function of the value alone, whatever file it came from.
"""

import json
from collections.abc import Sequence
from typing import Any

import orjson

from sft_pipeline.tables.reasons import MAX_DEPTH, RejectReason


class InvalidJson(ValueError):
    """Text that is not JSON, or JSON that is ambiguous. Carries the reason."""

    def __init__(self, reason: RejectReason) -> None:
        super().__init__(reason.explanation)
        self.reason = reason


def parse(text: str) -> Any:
    """A JSON value from the whole of a text.

    Raises:
        InvalidJson: Not JSON, or JSON that is ambiguous.
    """
    try:
        return _decoder.decode(text)
    except (RecursionError, ValueError) as error:
        raise _invalid(error) from None


def parse_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` (no white space there), and where it ends.

    Raises:
        InvalidJson: Not JSON, or JSON that is ambiguous.
    """
    try:
        return _decoder.raw_decode(text, start)
    except (RecursionError, ValueError) as error:
        raise _invalid(error) from None


def _invalid(error: Exception) -> InvalidJson:
    if isinstance(error, InvalidJson):
        return error
    return InvalidJson(
        RejectReason.TOO_DEEP if isinstance(error, RecursionError) else RejectReason.INVALID_JSON
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidJson(RejectReason.DUPLICATE_KEY)
    return found


def _no_constant(name: str) -> Any:
    raise InvalidJson(RejectReason.NOT_FINITE)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def canonical(value: Any) -> bytes:
    """Canonical JSON of a value that was read from JSON or is made of the same types.

    Raises:
        UnicodeEncodeError, RecursionError: The value has no JSON form.
        ValueError: It holds NaN or Infinity.
    """
    try:
        content = orjson.dumps(value, None, orjson.OPT_SORT_KEYS)
    except TypeError:
        return _encode_in_python(value).encode()
    if b"null" in content:  # orjson writes NaN and Infinity as null; Python's encoder refuses them
        _encode_in_python(value)
    return content


_encode_in_python = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def too_deep(value: Any, content: bytes) -> bool:
    """Whether a value with this JSON content is nested more than MAX_DEPTH levels deep."""
    # Counting brackets is far cheaper than walking the value, and settles nearly all rows.
    if content.count(b"{") + content.count(b"[") <= MAX_DEPTH:
        return False
    depth, level = 0, [value]
    while level:
        level = [v for v in level if isinstance(v, dict | list)]
        depth += bool(level)
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return depth > MAX_DEPTH


# Digits as "0", minus as it is, all else as a blank.
_NUMBERS = bytes(48 if 48 <= c <= 57 else 45 if c == 45 else 32 for c in range(256))


def has_huge_number(data: bytes) -> bool:
    """Whether JSON text has so many digits in a row that it may hold a whole number beyond 64 bits."""
    shape = data.translate(_NUMBERS)
    return b"0" * 20 in shape or b"-" + b"0" * 19 in shape


def read_canonical(contents: Sequence[bytes]) -> list[dict[str, Any]]:
    """The rows of the contents that raw_rows keeps: JSON objects as they were written.

    orjson reads them as Python does, but turns whole numbers beyond 64 bits into floats.
    """
    if has_huge_number(b"\n".join(contents)):
        return [(json if has_huge_number(content) else orjson).loads(content) for content in contents]
    return list(map(orjson.loads, contents))

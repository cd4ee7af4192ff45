"""From what a file holds to canonical rows: strict JSON objects, or the reason why it is none, with the bytes kept.

Canonical content is what orjson writes (keys sorted), and what Python's encoder writes where orjson cannot hold the
value (whole numbers beyond 64 bits): a function of the value alone, whatever file it came from.
"""

import datetime
import decimal
import hashlib
import json
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import orjson

MAX_LINE = 32 << 20  # bytes; above this a line is not read into memory whole
KEPT_OF_LONG_LINE = 4_096
MAX_DEPTH = 100


class ExplainedEnum(StrEnum):
    """Codes that carry a one-line explanation."""

    explanation: str

    def __new__(cls, value: str, explanation: str) -> "ExplainedEnum":
        member = str.__new__(cls, value)
        member._value_ = value
        member.explanation = explanation
        return member


class Undecodable(ExplainedEnum):
    """Why a line is not a row."""

    INVALID_UTF8 = "invalid_utf8", "the bytes are not UTF-8"
    INVALID_UNICODE = "invalid_unicode", "the text holds half of a surrogate pair, which no file can store"
    INVALID_JSON = "invalid_json", "the line is not JSON"
    NOT_AN_OBJECT = "not_an_object", "the line is JSON, but not an object with named fields"
    NOT_FINITE = "not_finite", "NaN or Infinity, which JSON does not have"
    DUPLICATE_KEY = "duplicate_key", "an object names the same key twice: which value counts is not defined"
    TOO_DEEP = "too_deep", f"nested more than {MAX_DEPTH} levels deep"
    LINE_TOO_LONG = (
        "line_too_long",
        f"longer than {MAX_LINE >> 20} MiB; only its beginning, length and SHA-256 are kept",
    )
    INVALID_CSV = "invalid_csv", "broken quoting in a CSV record"
    RAGGED_ROW = "ragged_row", "the record has another number of fields than the header"
    UNSUPPORTED_VALUE = (
        "unsupported_value",
        "a value of a type that JSON cannot hold, for example binary data",
    )


class Row(NamedTuple):
    """A decoded row: `content` is canonical JSON in UTF-8, `row_id` the first 128 bits of its SHA-256 in hexadecimal."""

    line: int
    row_id: str
    content: bytes


class Rows(NamedTuple):
    """Several rows, as columns."""

    lines: Sequence[int]
    row_ids: Sequence[str]
    contents: Sequence[bytes]


class Bad(NamedTuple):
    """What could not be decoded. `raw` is text; bytes that are not UTF-8 are in it as \\xNN."""

    line: int
    row_id: str
    reason: Undecodable
    raw: str


GATHERED_ROWS = 1_024
GATHERED_BYTES = 4 << 20


def gather(found: Iterable[Row | Bad]) -> Iterator[Rows | Bad]:
    """The same rows and rejects in the same order, with the rows between two rejects as columns."""
    rows: list[Row] = []
    size = 0
    for one in found:
        if isinstance(one, Row):
            rows.append(one)
            size += len(one.content)
            if len(rows) < GATHERED_ROWS and size < GATHERED_BYTES:
                continue
        if rows:
            yield Rows(*zip(*rows))
            rows, size = [], 0
        if isinstance(one, Bad):
            yield one
    if rows:
        yield Rows(*zip(*rows))


def decode_strictly(line: int, data: bytes) -> Row | Bad:
    """One JSON object from one line of bytes (without its line end, BOM allowed). `lines.py` must give the same."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return bad(line, Undecodable.INVALID_UTF8, data)
    try:
        value = parse(text)
    except Refused as refused:
        return bad(line, refused.reason, data)
    return encode(line, value, data)


class Refused(ValueError):
    """Raised while parsing; carries the reason."""

    def __init__(self, reason: Undecodable) -> None:
        super().__init__(reason.explanation)
        self.reason = reason


def parse(text: str) -> Any:
    """A JSON value from text.

    Raises:
        Refused: Not JSON, or JSON that is ambiguous.
    """
    return guarded(_decoder.decode, text)


def guarded(decode: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of `_decoder`, turning whatever it may raise into Refused."""
    try:
        return decode(*arguments)
    except Refused:
        raise
    except RecursionError:
        raise Refused(Undecodable.TOO_DEEP) from None
    except ValueError:
        raise Refused(Undecodable.INVALID_JSON) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Refused(Undecodable.DUPLICATE_KEY)
    return found


def _no_constant(name: str) -> Any:
    raise Refused(Undecodable.NOT_FINITE)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
raw_decode = _decoder.raw_decode


def encode(line: int, value: Any, raw: bytes | str) -> Row | Bad:
    """A decoded value as a row.

    Args:
        raw: What it was decoded from (str: decoded with surrogateescape), kept if the value is not a row.
    """
    if not isinstance(value, dict):
        return bad(line, Undecodable.NOT_AN_OBJECT, raw)
    try:
        content = _canonical(value)
    except UnicodeEncodeError:
        escaped = isinstance(raw, str) and any("\udc80" <= c <= "\udcff" for c in raw)
        return bad(line, Undecodable.INVALID_UTF8 if escaped else Undecodable.INVALID_UNICODE, raw)
    except RecursionError:
        return bad(line, Undecodable.TOO_DEEP, raw)
    except ValueError:
        return bad(line, Undecodable.NOT_FINITE, raw)
    except TypeError:
        return bad(line, Undecodable.UNSUPPORTED_VALUE, raw)
    if too_deep(value, content):
        return bad(line, Undecodable.TOO_DEEP, raw)
    return Row(line, hashlib.sha256(content).hexdigest()[:32], content)


def too_deep(value: Any, content: bytes) -> bool:
    """Whether a value with this canonical content is nested more than MAX_DEPTH levels deep."""
    return content.count(b"{") + content.count(b"[") > MAX_DEPTH and depth(value) > MAX_DEPTH


def depth(value: Any) -> int:
    """How deep objects and lists are nested: 1 for a flat object."""
    deepest, level = 0, [value]
    while level:
        level = [v for v in level if isinstance(v, dict | list)]
        deepest += bool(level)
        level = [child for v in level for child in (v.values() if isinstance(v, dict) else v)]
    return deepest


def _plain(value: Any) -> Any:
    """Values of Parquet and `datasets` that JSON has another notation for."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_encode_in_python = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
).encode


def _canonical(value: Any) -> bytes:
    """Canonical JSON.

    Raises:
        UnicodeEncodeError, RecursionError, TypeError: The value has no JSON form.
        ValueError: It holds NaN or Infinity.
    """
    try:
        content = orjson.dumps(value, _plain, orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME)
    except TypeError:
        return _encode_in_python(value).encode()
    if b"null" in content:  # which is what orjson makes of NaN
        _encode_in_python(value)
    return content


def without_nan(value: Any) -> Any:
    """A copy with NaN as null: in a table NaN stands for a missing value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return value


def bad(line: int, reason: Undecodable, raw: bytes | str) -> Bad:
    """A reject whose bytes are kept."""
    data = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw
    return Bad(line, hashlib.sha256(data).hexdigest()[:32], reason, data.decode("utf-8", "backslashreplace"))


def long_line(line: int, beginning: bytes, length: int, sha256: str) -> Bad:
    """The reject for a line that was never in memory whole."""
    text = beginning[:KEPT_OF_LONG_LINE].decode("utf-8", "backslashreplace")
    return Bad(line, sha256[:32], Undecodable.LINE_TOO_LONG, f"{text}… [{length} bytes, sha256 {sha256}]")

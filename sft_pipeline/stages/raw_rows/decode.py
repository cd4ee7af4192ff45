"""From bytes to rows: objects of strict JSON as they were written, or rejects with the reason and the bytes.

JSON lines are decoded a block at a time through orjson where that provably gives what the strict decoder
gives: orjson is many times faster, and a block is checked as a whole. Where anything in it might differ, its
lines go to the strict decoder one by one.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from sft_pipeline.tables.reasons import MAX_DEPTH, RejectReason
from sft_pipeline.tables.strict_json import InvalidJson, canonical, has_huge_number, parse, too_deep

KEPT_OF_LONG_LINE = 4_096
GATHERED_ROWS = 1_024
GATHERED_BYTES = 4 << 20


class Row(NamedTuple):
    """A decoded row.

    Attributes:
        content: JSON in UTF-8 as it was written, without white space around it: the order of keys, the
            spelling of numbers and the escapes are the source's own.
        row_id: The first 128 bits, in hexadecimal, of the SHA-256 of its canonical JSON, which does not
            depend on how it was written.
    """

    line: int
    row_id: str
    content: bytes


class Rows(NamedTuple):
    """Several rows, as columns."""

    lines: Sequence[int]
    row_ids: Sequence[str]
    contents: Sequence[bytes]


class Reject(NamedTuple):
    """What could not be decoded. `raw` is text; bytes that are not UTF-8 are in it as \\xNN."""

    line: int
    row_id: str
    reason: RejectReason
    raw: str


def gather(found: Iterable[Row | Reject]) -> Iterator[Rows | Reject]:
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
        if isinstance(one, Reject):
            yield one
    if rows:
        yield Rows(*zip(*rows))


def decode_lines(first: int, block: bytes) -> Iterator[Rows | Reject]:
    """The objects of a block of whole JSON lines; blank lines are no rows.

    Args:
        first: Number of the block's first line.
    """
    lines = block.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    return decode_all(first, lines)


def decode_all(first: int, lines: Sequence[bytes]) -> Iterator[Rows | Reject]:
    """The objects of JSON texts, which have the numbers from `first`; a blank one is no row."""
    stripped = [line.strip() for line in lines]
    if rows := _decode_fast(first, stripped):
        return iter([rows])
    return gather(decode_line(number, data) for number, data in enumerate(stripped, first) if data)


def decode_line(line: int, data: bytes) -> Row | Reject:
    """One JSON object from one line of bytes (without white space around it, BOM allowed)."""
    if rows := _decode_fast(line, [data]):
        return Row(line, rows.row_ids[0], rows.contents[0])
    return decode_strictly(line, data)


def _decode_fast(first: int, lines: list[bytes]) -> Rows | None:
    """The rows of stripped lines that are all in order, through orjson; None where one might not be.

    orjson refuses what the strict decoder refuses, and reads the same values, with two exceptions. Of equal
    keys it keeps the last: then the output has fewer quotes than the input, which is so in no other case,
    unless a quote was written as \\u0022. And it makes floats of whole numbers beyond 64 bits.
    """
    block = b"\n".join(lines)
    if b"\\u0022" in block or has_huge_number(block):
        return None
    loads, dumps, sha256 = orjson.loads, orjson.dumps, hashlib.sha256
    try:
        values = [loads(line) for line in lines]
        canonicals = [dumps(value, None, orjson.OPT_SORT_KEYS) for value in values]
    except (ValueError, TypeError):
        return None
    if set(map(type, values)) != {dict} or block.count(b'"') != b"".join(canonicals).count(b'"'):
        return None
    # Only where there are more brackets than one per line and MAX_DEPTH can a line be too deep.
    brackets = block.count(b"{") + block.count(b"[")
    if brackets >= len(lines) + MAX_DEPTH and any(map(too_deep, values, canonicals)):
        return None
    return Rows(range(first, first + len(lines)), [sha256(c).hexdigest()[:32] for c in canonicals], lines)


def decode_strictly(line: int, data: bytes) -> Row | Reject:
    """As `decode_line`, which must give the same, by the strict decoder alone."""
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    try:
        value = parse(data.decode())
    except UnicodeDecodeError:
        return reject(line, RejectReason.INVALID_UTF8, data)
    except InvalidJson as invalid:
        return reject(line, invalid.reason, data)
    return to_row(line, value, data)


def to_row(line: int, value: Any, raw: bytes | str) -> Row | Reject:
    """A decoded value as a row.

    Args:
        raw: The text that it was decoded from (str: decoded with surrogateescape), kept in either case.
    """
    if not isinstance(value, dict):
        return reject(line, RejectReason.NOT_AN_OBJECT, raw)
    try:
        named = canonical(value)
    except UnicodeEncodeError:
        escaped = isinstance(raw, str) and any("\udc80" <= c <= "\udcff" for c in raw)
        return reject(line, RejectReason.INVALID_UTF8 if escaped else RejectReason.INVALID_UNICODE, raw)
    except RecursionError:
        return reject(line, RejectReason.TOO_DEEP, raw)
    except ValueError:
        return reject(line, RejectReason.NOT_FINITE, raw)
    if too_deep(value, named):
        return reject(line, RejectReason.TOO_DEEP, raw)
    data = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw
    return Row(line, hashlib.sha256(named).hexdigest()[:32], data.strip())


def reject(line: int, reason: RejectReason, raw: bytes | str) -> Reject:
    """A reject whose bytes are kept."""
    data = raw.encode("utf-8", "surrogateescape") if isinstance(raw, str) else raw
    row_id = hashlib.sha256(data).hexdigest()[:32]
    return Reject(line, row_id, reason, data.decode("utf-8", "backslashreplace"))


def reject_long_line(line: int, beginning: bytes, length: int, sha256: str) -> Reject:
    """The reject for a line that was never in memory whole."""
    text = beginning[:KEPT_OF_LONG_LINE].decode("utf-8", "backslashreplace")
    raw = f"{text}… [{length} bytes, sha256 {sha256}]"
    return Reject(line, sha256[:32], RejectReason.LINE_TOO_LONG, raw)

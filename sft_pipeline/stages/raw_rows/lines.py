"""JSON lines, a block at a time, through orjson where that provably gives what the strict decoder gives.

orjson is many times faster, and a block is checked as a whole; where anything in it might differ, its lines go to the
strict decoder one by one.
"""

import hashlib
from collections.abc import Iterator

import orjson

from sft_pipeline.stages.raw_rows.decode import MAX_DEPTH, Bad, Row, Rows, decode_strictly, gather, too_deep


def decode_lines(first: int, block: bytes) -> Iterator[Rows | Bad]:
    """The objects of a block of whole JSON lines; blank lines are no rows.

    Args:
        first: Number of the block's first line.
    """
    lines = block.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    if rows := _decode_all(first, lines, block):
        return iter([rows])
    stripped = ((number, line.strip()) for number, line in enumerate(lines, first))
    return gather(decode_object(number, data) for number, data in stripped if data)


def decode_object(line: int, data: bytes) -> Row | Bad:
    """One JSON object from one line of bytes (without its line end, BOM allowed)."""
    if rows := _decode_all(line, [data], data):
        return Row(line, rows.row_ids[0], rows.contents[0])
    return decode_strictly(line, data)


def _decode_all(first: int, lines: list[bytes], block: bytes) -> Rows | None:
    """The rows of lines that are all in order, through orjson; None where one might not be.

    orjson refuses what the strict decoder refuses, and reads the same values, but for two things. Of equal keys it
    keeps the last: then the output has fewer quotes than the input, which is so in no other case, unless a quote was
    written as \\u0022. And it makes floats of whole numbers beyond 64 bits.
    """
    if b"\\u0022" in block or has_huge_number(block):
        return None
    loads, dumps, sha256 = orjson.loads, orjson.dumps, hashlib.sha256
    try:
        values = [loads(line) for line in lines]
        contents = [dumps(value, None, orjson.OPT_SORT_KEYS) for value in values]
    except (ValueError, TypeError):
        return None
    written = b"".join(contents)
    if set(map(type, values)) != {dict} or block.count(b'"') != written.count(b'"'):
        return None
    # Only where there are more brackets than one per line and MAX_DEPTH can a line be too deep.
    if written.count(b"{") + written.count(b"[") >= len(lines) + MAX_DEPTH and any(
        map(too_deep, values, contents)
    ):
        return None
    return Rows(range(first, first + len(lines)), [sha256(c).hexdigest()[:32] for c in contents], contents)


# Digits as "0", minus as it is, all else as a blank.
_NUMBERS = bytes(48 if 48 <= c <= 57 else 45 if c == 45 else 32 for c in range(256))


def has_huge_number(data: bytes) -> bool:
    """Whether JSON text may hold a whole number beyond 64 bits, or rather: so many digits in a row."""
    shape = data.translate(_NUMBERS)
    return b"0" * 20 in shape or b"-" + b"0" * 19 in shape

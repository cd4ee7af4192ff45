"""One streaming reader per file format. Each yields rows and rejects in file order and checks no contract."""

import csv
from collections import Counter, deque
from collections.abc import Container, Iterator

import orjson

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.decode import Reject, Row, Rows, decode_lines, gather, reject, to_row
from sft_pipeline.stages.raw_rows.json_document import looks_like_lines, read_document
from sft_pipeline.stages.raw_rows.streams import (
    CODECS,
    Advance,
    SourceFile,
    open_stream,
    read_blocks,
    read_lines,
)
from sft_pipeline.stages.raw_rows.table_files import read_arrow, read_parquet
from sft_pipeline.tables.reasons import MAX_LINE, RejectReason


def read_file(
    file: SourceFile,
    advance: Advance = lambda _: None,
    counts: Counter[str] | None = None,
    row_fields: Container[str] = (),
) -> Iterator[Rows | Reject]:
    """The rows and rejects of one file, in its order.

    Args:
        advance: Called with the number of bytes read of the file as it is stored (compressed or not).
        counts: What was written otherwise than it stands in the file is counted here.
        row_fields: Names of lists of objects that make a .json document one row.

    Raises:
        InputError: The file cannot be read as a whole: truncated, corrupt, not what its name says, or changed
            while it was read.
    """
    name = file.name.lower()
    for codec in CODECS:
        name = name.removesuffix(codec)
    counts = Counter() if counts is None else counts
    if name.endswith(".parquet"):
        return read_parquet(file, advance, counts)
    if name.endswith(".arrow"):
        return read_arrow(file, advance, counts)
    if name.endswith(".csv"):
        return gather(_read_csv(file, advance, ","))
    if name.endswith(".tsv"):
        return gather(_read_csv(file, advance, "\t"))
    if name.endswith(".json") and not looks_like_lines(file):
        return gather(read_document(file, advance, row_fields))
    return _read_json_lines(file, advance)


def _read_json_lines(file: SourceFile, advance: Advance) -> Iterator[Rows | Reject]:
    """One object per line; blank lines are no rows."""
    with open_stream(file, advance) as stream:
        for first, block in read_blocks(stream, file):
            if isinstance(block, Reject):
                yield block
            else:
                yield from decode_lines(first, block)


# -- CSV -------------------------------------------------------------------------------------------


class _CsvLines:
    """Feeds the csv module line by line, and remembers the lines of the record that is being read."""

    def __init__(self, lines: Iterator[tuple[int, bytes | Reject]]) -> None:
        self._lines = lines
        self._again: deque[tuple[int, str]] = deque()
        self.record: list[tuple[int, str]] = []
        self.too_long: Reject | None = None
        self._bytes = 0

    def begin(self) -> None:
        self.record, self._bytes = [], 0

    def put_back(self) -> None:
        """Everything but the record's first line is read again."""
        self._again.extendleft(reversed(self.record[1:]))

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        if self._again:
            number, text = self._again.popleft()
        else:
            number, line = next(self._lines)
            if isinstance(line, Reject):
                self.too_long = line
                raise csv.Error("line too long")
            text = line.decode("utf-8", "surrogateescape")
            if number == 1:
                text = text.removeprefix("\ufeff")
        self.record.append((number, text))
        self._bytes += len(text)
        if self._bytes > MAX_LINE:
            raise csv.Error("record too long")
        return text


def _read_csv(file: SourceFile, advance: Advance, delimiter: str) -> Iterator[Row | Reject]:
    """Records under a header; every value is text, in the order of the columns. A broken record costs its
    first line, no row after it."""
    csv.field_size_limit(
        MAX_LINE
    )  # of the whole process: the csv module has no other way, and 128 KiB is too little
    with open_stream(file, advance) as stream:
        lines = _CsvLines(read_lines(stream, file))
        header: list[str] | None = None
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            lines.begin()
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error:
                if lines.record:
                    yield reject(lines.record[0][0], RejectReason.INVALID_CSV, lines.record[0][1])
                    lines.put_back()
                if lines.too_long:
                    yield lines.too_long
                    lines.too_long = None
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            if not fields:
                continue
            if header is None:
                header = fields
                if twice := sorted({f for f in fields if fields.count(f) > 1}):
                    raise InputError(
                        f"{file.given}, line 1: the header names {', '.join(map(repr, twice))} twice: rename "
                        "the columns"
                    )
                continue
            number, raw = lines.record[0][0], "".join(text for _, text in lines.record)
            if len(fields) != len(header):
                yield reject(number, RejectReason.RAGGED_ROW, raw)
            else:
                record = dict(zip(header, fields))
                row = to_row(number, record, raw)
                yield row._replace(content=orjson.dumps(record)) if isinstance(row, Row) else row

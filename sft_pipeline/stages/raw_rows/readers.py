"""One streaming reader per file format. Each yields rows and rejects in file order and checks no contract."""

import csv
import math
from collections import deque
from collections.abc import Iterator
from itertools import count
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.decode import Reject, Row, Rows, decode_lines, gather, reject, to_row
from sft_pipeline.stages.raw_rows.json_document import looks_like_lines, read_document
from sft_pipeline.stages.raw_rows.locate import parse_address
from sft_pipeline.stages.raw_rows.streams import (
    CODECS,
    Advance,
    SourceFile,
    open_stream,
    read_blocks,
    read_lines,
)
from sft_pipeline.tables.reasons import MAX_LINE, RejectReason


def read_file(file: SourceFile, advance: Advance = lambda _: None) -> Iterator[Rows | Reject]:
    """The rows and rejects of one file, in its order.

    Args:
        advance: Called with the number of bytes read of the file as it is stored (compressed or not).

    Raises:
        InputError: The file cannot be read as a whole: truncated, corrupt, not what its name says.
    """
    name = file.path.lower()
    for codec in CODECS:
        name = name.removesuffix(codec)
    if name.endswith(".parquet"):
        return gather(_read_parquet(file, advance))
    if name.endswith(".csv"):
        return gather(_read_csv(file, advance, ","))
    if name.endswith(".tsv"):
        return gather(_read_csv(file, advance, "\t"))
    if name.endswith(".json") and not looks_like_lines(file):
        return gather(read_document(file, advance))
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
    """Records under a header; every value is text. A broken record costs its first line, no row after it."""
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
                yield to_row(number, dict(zip(header, fields)), raw)


# -- Parquet ---------------------------------------------------------------------------------------


def _read_parquet(file: SourceFile, advance: Advance) -> Iterator[Row | Reject]:
    """`line` is the row's number from 1. A NaN is a missing value; times become ISO text, decimals text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with file.fs.open(file.path, "rb") as stream, pq.ParquetFile(stream) as parquet:
            share = file.bytes / max(1, parquet.metadata.num_rows)
            for batch in parquet.iter_batches(batch_size=512):  # few, as a row may have megabytes
                for value in _values(batch):
                    number += 1
                    yield _table_row(number, value)
                advance(int(batch.num_rows * share))
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{file.given}: not a readable Parquet file after row {number} ({str(error).splitlines()[0]}): "
            "copy it again"
        ) from error


def _values(batch: Any) -> list[Any]:
    """The batch's rows as dicts; a row with broken text as the exception that it raised."""
    try:
        return batch.to_pylist()
    except (UnicodeDecodeError, ValueError):  # one broken text fails the whole batch: find it row by row
        values: list[Any] = []
        for i in range(batch.num_rows):
            try:
                values += batch.slice(i, 1).to_pylist()
            except (UnicodeDecodeError, ValueError) as error:
                values.append(error)
        return values


def _table_row(number: int, value: Any) -> Row | Reject:
    if isinstance(value, UnicodeDecodeError):
        return reject(number, RejectReason.INVALID_UTF8, value.object)
    if isinstance(value, Exception):
        return reject(number, RejectReason.UNSUPPORTED_VALUE, str(value))
    row = to_row(number, value, "")
    if isinstance(row, Reject) and row.reason is RejectReason.NOT_FINITE:
        value = _without_nan(value)
        row = to_row(number, value, "")
    if isinstance(row, Reject):
        return reject(number, row.reason, repr(value).encode("utf-8", "backslashreplace"))
    return row


def _without_nan(value: Any) -> Any:
    """A copy with NaN as null: in a table NaN stands for a missing value."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return value


# -- Hugging Face datasets -------------------------------------------------------------------------


def read_hub(address: str) -> Iterator[Row | Reject]:
    """The rows of one split, streamed through `datasets`. The split is `train`, or the only one, unless
    named.

    Raises:
        InputError: The dataset, its configuration or split is not found, or cannot be read.
    """
    from datasets import load_dataset

    dataset = parse_address(address)
    source = str(dataset.folder or dataset.name)
    # `datasets` raises many kinds of errors, all of which mean that this address gives no data.
    try:
        splits: Any = load_dataset(source, dataset.config, revision=dataset.revision, streaming=True)
    except Exception as error:
        raise InputError(f"{address}: cannot be loaded: {_first_line(error)}") from error
    name = dataset.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if name not in splits:
        raise InputError(f"{address}: no split {name}; add ?split=NAME with one of {', '.join(splits)}")
    values = iter(splits[name])
    for number in count(1):
        try:
            value = next(values)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(f"{address}: reading stopped: {_first_line(error)}") from error
        yield _table_row(number, value)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else error.__class__.__name__

"""Rows of Parquet files, Arrow files and Hugging Face datasets: tables whose columns have types.

A row becomes JSON in the order of its columns. What JSON has no notation for is written as follows:

- A struct's field that is null is absent: a table gives each struct the fields of all others, and fills with
  null what the row did not have. A column, an element of a list and a value of a map stay null.
- A map whose keys are text is an object.
- A column (or field) of JSON text, that is of Arrow's `arrow.json` type, which is also that of `datasets`'
  `Json()` and of Parquet's JSON, gives the value that the text holds, as it is spelled there.
- Binary data is replaced by `{"bytes": its length, "sha256": its digest}` and counted, so that only a row
  that uses such a column is rejected later.
- NaN and infinity are null. Times are ISO text, decimals, durations and UUIDs text.

`line` is the row's number from 1.
"""

import datetime
import decimal
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pyarrow as pa

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.decode import Reject, Rows, decode_all, reject
from sft_pipeline.stages.raw_rows.locate import parse_address
from sft_pipeline.stages.raw_rows.streams import Advance, SourceFile, unchanged
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.strict_json import InvalidJson, parse

BATCH_ROWS = 512  # few, as a row may have megabytes
BINARY_VALUES = "binary_values"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(file: SourceFile, advance: Advance, counts: Counter[str]) -> Iterator[Rows | Reject]:
    """The rows of a Parquet file.

    Raises:
        InputError: It is truncated or corrupt, two columns have the same name, or it changed meanwhile.
    """
    import pyarrow.parquet as pq

    number = 0
    with unchanged(file):
        try:
            with file.fs.open(file.path, "rb") as stream, pq.ParquetFile(stream) as parquet:
                share = file.bytes / max(1, parquet.metadata.num_rows)
                table = TableRows(parquet.schema_arrow, file.given, counts)
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                    yield from table.rows(number + 1, batch)
                    number += batch.num_rows
                    advance(int(batch.num_rows * share))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, "Parquet", number, error) from error


def read_arrow(file: SourceFile, advance: Advance, counts: Counter[str]) -> Iterator[Rows | Reject]:
    """The rows of an Arrow file, in the file format or the stream format of Arrow IPC.

    Raises:
        InputError: It is truncated or corrupt, two columns have the same name, or it changed meanwhile.
    """
    number = read = 0
    with unchanged(file):
        try:
            with file.fs.open(file.path, "rb") as stream:
                for schema, batch in _ipc_batches(stream):
                    if not number:
                        table = TableRows(schema, file.given, counts)
                    for start in range(0, batch.num_rows, BATCH_ROWS):
                        piece = batch.slice(start, BATCH_ROWS)
                        yield from table.rows(number + 1, piece)
                        number += piece.num_rows
                    advance(max(0, stream.tell() - read))
                    read = max(read, stream.tell())
                advance(file.bytes - read)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, "Arrow", number, error) from error


def _ipc_batches(stream: Any) -> Iterator[tuple[pa.Schema, pa.RecordBatch]]:
    if stream.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(stream)
        for i in range(reader.num_record_batches):
            yield reader.schema, reader.get_batch(i)
        return
    # Arrow takes a stream that is cut between two batches for a whole one, and reads the first of several.
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - len(END_OF_STREAM)))
    if stream.read() != END_OF_STREAM:
        raise pa.ArrowInvalid("no mark at the end of the stream")
    stream.seek(0)
    with pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            yield reader.schema, batch
    if stream.tell() != size:
        raise pa.ArrowInvalid("more follows after the end of the stream")


def _unreadable(file: SourceFile, kind: str, number: int, error: Exception) -> InputError:
    return InputError(
        f"{file.given}: not a readable {kind} file after row {number} ({_first_line(error)}): copy it again"
    )


def read_hub(address: str, counts: Counter[str], commit: str | None = None) -> Iterator[Rows | Reject]:
    """The rows of one split, streamed through `datasets`. The split is `train`, or the only one, unless
    named.

    Rows are as `datasets` gives them: of JSON files it keeps neither the spelling of numbers nor, where it
    makes structs of objects, the order of keys.

    Args:
        commit: The commit that the revision stands for, where it is known.

    Raises:
        InputError: The dataset, its configuration or split is not found, or cannot be read.
    """
    from datasets import load_dataset

    dataset = parse_address(address)
    source = str(dataset.folder or dataset.name)
    # `datasets` raises many kinds of errors, all of which mean that this address gives no data.
    try:
        splits: Any = load_dataset(
            source, dataset.config, revision=commit or dataset.revision, streaming=True
        )
    except Exception as error:
        raise InputError(f"{address}: cannot be loaded: {_first_line(error)}") from error
    name = dataset.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if name not in splits:
        raise InputError(f"{address}: no split {name}; add ?split=NAME with one of {', '.join(splits)}")
    tables = splits[name].with_format("arrow").iter(BATCH_ROWS)
    number = 0
    while True:
        try:
            found = next(tables, None)
        except Exception as error:
            raise InputError(f"{address}: reading stopped: {_first_line(error)}") from error
        if found is None:
            return
        for batch in found.to_batches():
            yield from TableRows(batch.schema, address, counts).rows(number + 1, batch)
            number += batch.num_rows


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else error.__class__.__name__


# -- values ----------------------------------------------------------------------------------------

Read = Callable[[Any], Any]


class TableRows:
    """Makes rows of the batches of one schema.

    Args:
        given: The file's name, for messages.
        counts: Binary values are counted in it.

    Raises:
        InputError: Two columns, or two fields of a struct, have the same name.
    """

    def __init__(self, schema: pa.Schema, given: str, counts: Counter[str]) -> None:
        self._counts = counts
        if twice := _named_twice(list(schema)):
            raise InputError(f"{given}: two columns are named {twice!r}: rename one")
        readers = {f.name: self._reader(f.type) for f in schema}
        self._readers = {name: read for name, read in readers.items() if read}

    def rows(self, first: int, batch: pa.RecordBatch) -> Iterator[Rows | Reject]:
        """The batch's rows and rejects in their order, which have the numbers from `first`."""
        texts: list[bytes] = []
        start = first
        for number, value in enumerate(_values(batch), first):
            text = self._text(number, value)
            if isinstance(text, bytes):
                texts.append(text)
                continue
            yield from decode_all(start, texts)
            yield text
            texts, start = [], number + 1
        yield from decode_all(start, texts)

    def _text(self, number: int, value: Any) -> bytes | Reject:
        if isinstance(value, UnicodeDecodeError):
            return reject(number, RejectReason.INVALID_UTF8, value.object)
        if isinstance(value, Exception):
            return reject(number, RejectReason.UNSUPPORTED_VALUE, str(value))
        try:
            written = value | {n: read(value[n]) for n, read in self._readers.items() if value[n] is not None}
            return orjson.dumps(written, _plain, orjson.OPT_PASSTHROUGH_DATETIME)
        except InvalidJson as invalid:
            reason = invalid.reason
        except TypeError:
            reason = RejectReason.UNSUPPORTED_VALUE
        return reject(number, reason, repr(value).encode("utf-8", "backslashreplace"))

    def _reader(self, kind: pa.DataType) -> Read | None:
        """What is to be done with a value of this type that is not null; None for nothing."""
        types = pa.types
        if isinstance(kind, pa.JsonType):
            read: Read | None = _json
        elif isinstance(kind, pa.BaseExtensionType):
            read = self._reader(kind.storage_type)
        elif types.is_dictionary(kind) or types.is_run_end_encoded(kind):
            read = self._reader(kind.value_type)
        elif types.is_struct(kind):
            read = _struct({f.name: self._reader(f.type) for f in kind})
        elif types.is_map(kind):
            read = _map(self._reader(kind.item_type), types.is_string(kind.key_type))
        elif _is_list(kind):
            read = (inner := self._reader(kind.value_type)) and _list(inner)
        elif _is_binary(kind):
            read = self._binary
        else:
            return None
        return read

    def _binary(self, value: Any) -> Any:
        if not isinstance(value, bytes):  # a UUID, which is stored as bytes
            return value
        self._counts[BINARY_VALUES] += 1
        return {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}


def _named_twice(fields: list[pa.Field]) -> str | None:
    """A name that two of the fields have, or two fields inside one of them."""
    names = [f.name for f in fields]
    inner = (_named_twice(_children(f.type)) for f in fields)
    return next((n for n in names if names.count(n) > 1), None) or next(filter(None, inner), None)


def _children(kind: pa.DataType) -> list[pa.Field]:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _json(text: str) -> orjson.Fragment:
    parse(text)
    return orjson.Fragment(text)


def _struct(readers: dict[str, Read | None]) -> Read:
    inside = [(name, inner) for name, inner in readers.items() if inner]

    def read(value: dict[str, Any]) -> dict[str, Any]:
        if None in value.values():
            value = {name: v for name, v in value.items() if v is not None}
        for name, inner in inside:
            if name in value:
                value[name] = inner(value[name])
        return value

    return read


def _list(inner: Read) -> Read:
    return lambda value: [v if v is None else inner(v) for v in value]


def _map(inner: Read | None, is_object: bool) -> Read:
    def read(pairs: list[tuple[Any, Any]]) -> Any:
        found = [(k, inner(v) if inner and v is not None else v) for k, v in pairs]
        if not is_object:
            return found
        if len(dict(found)) < len(found):
            raise InvalidJson(RejectReason.DUPLICATE_KEY)
        return dict(found)

    return read


def _values(batch: pa.RecordBatch) -> list[Any]:
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


def _plain(value: Any) -> Any:
    """Values that JSON has another notation for."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta | uuid.UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")

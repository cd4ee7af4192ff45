"""Parquet as the data stages use it: written in parts with fixed settings, read as a stream of batches.

Where row groups and parts end depends only on the rows, never on how they were handed over, so an artifact
built twice has the same bytes. Memory holds one row group when writing and one batch when reading.
"""

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sft_pipeline.store.files import fsync_path

MOST_DETAILS = 1_000
ROW_GROUP = 8_192
ROWS_PER_PART = 262_144
BATCH_ROWS = 4_096
ROW_GROUP_BYTES = 64 << 20  # a row group ends early here, so that rows of megabytes do not fill the memory
WAITING_BYTES = 64 << 20  # of batches that wait to be written, unless a single one has more

_disk = ThreadPoolExecutor(2, "disk")


class FileWriter:
    """Writes one Parquet file, also if there are no rows.

    Args:
        path: The file; its folder is made.
        schema: Its columns. What is written is cast to it (safely).
        row_group: Rows per row group.
        of_tokens: Whether it is mostly long lists of token ids. They are written and read in two thirds of
            the time without a dictionary, without statistics of the lists and with lz4, which takes 1.6 times
            the space.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, *, row_group: int = ROW_GROUP, of_tokens: bool = False
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.schema, self.row_group = path, schema, row_group
        self.rows = 0
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = self._pending_bytes = 0
        self._syncing: Future[None] | None = None
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="lz4" if of_tokens else "zstd",
            compression_level=None if of_tokens else 1,
            use_dictionary=not of_tokens,
            write_statistics=[f.name for f in schema if not (of_tokens and pa.types.is_list(f.type))],
        )

    def write(self, data: pa.Table | pa.RecordBatch) -> None:
        """Appends rows; they reach the disk one row group at a time."""
        batches = data.to_batches() if isinstance(data, pa.Table) else [data]
        for batch in batches:
            if batch.schema != self.schema:
                batch = batch.select(self.schema.names).cast(self.schema)
            for piece in self._cut(batch):
                self._pending.append(piece)
                self._pending_rows += piece.num_rows
                self.rows += piece.num_rows
                if self._pending_rows == self.row_group or self._pending_bytes >= ROW_GROUP_BYTES:
                    self._flush()
                    self._begin_to_sync()

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows given as dicts."""
        self.write(pa.RecordBatch.from_pylist(list(rows), schema=self.schema))

    def _cut(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The batch in pieces that end where a row group ends. Keeps the count of pending bytes."""
        start = 0
        while start < batch.num_rows:
            count = min(self.row_group - self._pending_rows, batch.num_rows - start)
            piece = batch.slice(start, count)
            left = ROW_GROUP_BYTES - self._pending_bytes
            if piece.nbytes > left:  # only with huge rows: count them one by one
                count, used = 0, 0
                while used < left and start + count < batch.num_rows:
                    used += batch.slice(start + count, 1).nbytes
                    count += 1
                piece = batch.slice(start, count)
            self._pending_bytes += piece.nbytes
            start += count
            yield piece

    def _flush(self) -> None:
        if self._pending_rows:
            self._writer.write_table(
                pa.Table.from_batches(self._pending, self.schema), row_group_size=self._pending_rows
            )
        self._pending = []
        self._pending_rows = self._pending_bytes = 0

    def _begin_to_sync(self) -> None:
        """Starts an fsync in the background, so that the one of the store, at the end, has little to do."""
        if self._syncing is None or self._syncing.done():
            self._wait_for_sync()
            self._syncing = _disk.submit(fsync_path, self.path)

    def _wait_for_sync(self) -> None:
        if self._syncing:
            self._syncing.result()  # the kernel reports a write error only once, so it must not be lost here

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._wait_for_sync()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._pending = []
            with contextlib.suppress(OSError):  # the footer fails too; the first error is the one to report
                self._writer.close()


class PartWriter:
    """Writes a folder of part-00000.parquet, part-00001.parquet, ...; one empty part if there are no rows.

    Args:
        folder: Where the parts go; made if absent.
        schema: The columns.
        rows_per_part: Rows after which the next part begins.
        row_group, of_tokens: As for `FileWriter`.
    """

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        *,
        rows_per_part: int = ROWS_PER_PART,
        row_group: int = ROW_GROUP,
        of_tokens: bool = False,
    ) -> None:
        self.folder, self.schema, self.rows_per_part = folder, schema, rows_per_part
        self.row_group, self.of_tokens = row_group, of_tokens
        self.paths: list[Path] = []
        self.rows = 0
        self._part = self._next()

    def _next(self) -> FileWriter:
        path = self.folder / f"part-{len(self.paths):05d}.parquet"
        self.paths.append(path)
        return FileWriter(path, self.schema, row_group=self.row_group, of_tokens=self.of_tokens)

    def write(self, data: pa.Table | pa.RecordBatch) -> None:
        """Appends rows in order."""
        start = 0
        while start < data.num_rows:
            if self._part.rows == self.rows_per_part:
                self._part.close()
                self._part = self._next()
            count = min(self.rows_per_part - self._part.rows, data.num_rows - start)
            self._part.write(data.slice(start, count))
            self.rows += count
            start += count

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows given as dicts."""
        self.write(pa.RecordBatch.from_pylist(list(rows), schema=self.schema))

    def close(self) -> None:
        self._part.close()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.__exit__(kind, error, trace)


class BackgroundWriter:
    """Calls functions one after the other in a thread, for work that leaves the interpreter free.

    Leaving the context waits for all calls; an error of one is raised by a later `submit`, or on leaving.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future[Any], int]] = deque()

    def submit(self, function: Callable[[Any], Any], data: pa.Table | pa.RecordBatch) -> None:
        """Calls a function with data when the calls before it are done; waits while others have much data."""
        self._waiting.append((self._pool.submit(function, data), data.nbytes))
        while len(self._waiting) > 1 and (
            self._waiting[0][0].done() or sum(n for _, n in self._waiting) > WAITING_BYTES
        ):
            self._waiting.popleft()[0].result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for call, _ in self._waiting:
                call.result()


def read_batches(
    paths: Iterable[Path], columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The rows of Parquet files in order, a batch at a time.

    Args:
        paths: Files, for example `artifact.parts("rows")`.
        columns: Top-level columns to read; all by default.
        batch_rows: At most this many rows per batch.
    """
    wanted = None if columns is None else list(columns)
    for path in paths:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=batch_rows, columns=wanted)


def read_ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same batches; a thread reads the next one while this one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


def read_rows(paths: Iterable[Path], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files in order, as dicts: slow, for reports and tests."""
    for batch in read_batches(paths, columns):
        yield from batch.to_pylist()


def count_rows(paths: Iterable[Path]) -> int:
    """Rows in Parquet files, from their footers."""
    total = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            total += file.metadata.num_rows
    return total


def count_reasons(paths: Iterable[Path]) -> dict[str, int]:
    """How often each reason occurs in rejects files, most frequent first (ties by name)."""
    counts: dict[str, int] = {}
    for batch in read_batches(paths, ["reasons"]):
        for entry in pc.value_counts(pc.list_flatten(batch.column(0))).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def count_details(paths: Iterable[Path]) -> dict[str, Counter[str]]:
    """{reason: rows by what of them it is about}. At most MOST_DETAILS different ones are counted of each."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for batch in read_batches(paths, ["reasons", "details"]):
        for reasons, details in zip(*(column.to_pylist() for column in batch.columns)):
            for reason, detail in zip(reasons, details or ()):
                if detail and (detail in found[reason] or len(found[reason]) < MOST_DETAILS):
                    found[reason][detail] += 1
    return found


def first_offenders(path: Path, count: int = 10) -> list[dict[str, str]]:
    """The first rows of a rejects file for a report: where, why, and the beginning of the raw row."""
    return [
        {
            "where": f"{row['file']}:{row['line']}",
            "reasons": ", ".join(row["reasons"]),
            "raw": row["raw"][:200],
        }
        for row in islice(read_rows([path]), count)
    ]

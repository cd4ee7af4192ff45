"""Bytes of source files: opened through fsspec, decompressed, counted, cut into lines of bounded length."""

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.decode import KEPT_OF_LONG_LINE, Reject, reject_long_line
from sft_pipeline.tables.reasons import MAX_LINE

CODECS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUPPORTED = (*tuple(s + c for s in SUFFIXES[:-1] for c in ("", *CODECS)), ".parquet")
Advance = Callable[[int], None]
BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: Path relative to the snapshot's or source's root, posix.
        given: Path as the configuration gives it (relative to the project root where it is), posix.
        fs: The fsspec file system, and `path` the file's path there.
        bytes: Its size.
    """

    name: str
    given: str
    fs: Any
    path: str
    bytes: int

    @property
    def codec(self) -> str | None:
        return next((c for end, c in CODECS.items() if self.path.lower().endswith(end)), None)


class _CountedStream(io.RawIOBase):
    """Reports how many bytes of the file were read."""

    def __init__(self, stream: IO[bytes], advance: Advance) -> None:
        self._stream, self._advance = stream, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._advance(len(data))
        return len(data)


@contextlib.contextmanager
def open_stream(file: SourceFile, advance: Advance = lambda _: None) -> Iterator[io.BufferedReader]:
    """The file's decompressed bytes.

    Raises:
        InputError: It cannot be opened, or is UTF-16, or (while reading) truncated or corrupt.
    """
    import pyarrow as pa

    with contextlib.ExitStack() as stack:
        try:
            counted = io.BufferedReader(
                _CountedStream(stack.enter_context(file.fs.open(file.path, "rb")), advance), BLOCK
            )
        except (OSError, ValueError) as error:
            raise InputError(f"cannot open {file.given}: {error}") from error
        if file.codec:
            if not counted.peek(1):  # Arrow would take it for an empty file
                raise InputError(f"{file.given}: truncated {file.codec} file (it is empty): copy it again")
            stream = io.BufferedReader(
                pa.CompressedInputStream(pa.PythonFile(counted, "r"), file.codec), BLOCK
            )
        else:
            stream = counted
        with _explain(file, lambda: 0):
            start = stream.peek(2)[:2]
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(
                f"{file.given} is UTF-16: convert it, for example with `iconv -f UTF-16 -t UTF-8`"
            )
        yield stream


@contextlib.contextmanager
def _explain(file: SourceFile, line: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = "truncated" if "Truncated" in str(error) else "corrupt"
        what = f"{kind} {file.codec} file" if file.codec else f"cannot be read ({error})"
        raise InputError(f"{file.given}: {what} after line {line()}: copy it again") from error


def read_lines(stream: io.BufferedReader, file: SourceFile) -> Iterator[tuple[int, bytes | Reject]]:
    """(line number from 1, the line with its end), or a reject for a line above MAX_LINE bytes."""
    number = 0
    with _explain(file, lambda: number):
        while data := stream.readline(MAX_LINE + 1):
            number += 1
            yield number, _rest_of_long_line(stream, number, data) if _is_cut(data) else data


def read_blocks(stream: io.BufferedReader, file: SourceFile) -> Iterator[tuple[int, bytes | Reject]]:
    """(number of the first line, about 1 MB of whole lines), or a reject for a line above MAX_LINE bytes."""
    number = 1
    with _explain(file, lambda: number - 1):
        while block := stream.read(min(BLOCK, MAX_LINE)):
            reject = None
            if not block.endswith(b"\n"):
                start = block.rfind(b"\n") + 1
                last = block[start:] + stream.readline(MAX_LINE + 1 - (len(block) - start))
                block = block[:start]
                if _is_cut(last):
                    reject = _rest_of_long_line(stream, number + block.count(b"\n"), last)
                else:
                    block += last
            if block:
                yield number, block
                number += block.count(b"\n")
            if reject:
                yield number, reject
                number += 1


def _is_cut(line: bytes) -> bool:
    return len(line) > MAX_LINE and not line.endswith(b"\n")


def _rest_of_long_line(stream: io.BufferedReader, number: int, data: bytes) -> Reject:
    """Reads the line that begins with `data` to its end, and keeps little of it."""
    beginning, length, sha = data[:KEPT_OF_LONG_LINE], len(data), hashlib.sha256(data)
    while not data.endswith(b"\n") and (data := stream.readline(BLOCK)):
        length += len(data)
        sha.update(data)
    return reject_long_line(number, beginning, length, sha.hexdigest())


def read_chunks(stream: io.BufferedReader, file: SourceFile, line: Callable[[], int]) -> Iterator[bytes]:
    """The bytes, about 1 MB at a time. `line` returns where the reader is, for messages."""
    with _explain(file, line):
        while data := stream.read(BLOCK):
            yield data

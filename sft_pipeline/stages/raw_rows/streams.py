"""Bytes of source files: opened through fsspec, hashed, decompressed, counted, cut into bounded lines.

What is read of a file must have the digest that its artifact records, else the file changed meanwhile.
"""

import contextlib
import hashlib
import io
import lzma
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file, file_state
from sft_pipeline.stages.raw_rows.decode import KEPT_OF_LONG_LINE, Reject, reject_long_line
from sft_pipeline.tables.reasons import MAX_LINE

CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
LINES_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
TEXT_SUFFIXES = (*LINES_SUFFIXES, ".json", ".csv", ".tsv")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUPPORTED = (*(s + c for s in TEXT_SUFFIXES for c in ("", *CODECS)), *TABLE_SUFFIXES)
FORMATS = f"{', '.join(TEXT_SUFFIXES)} (also compressed: {', '.join(CODECS)}), {', '.join(TABLE_SUFFIXES)}"
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
        sha256: The digest that is recorded for it; where it is known, other bytes are refused.
    """

    name: str
    given: str
    fs: Any
    path: str
    bytes: int
    sha256: str | None = None

    @property
    def codec(self) -> str | None:
        return next((c for end, c in CODECS.items() if self.name.lower().endswith(end)), None)

    def digest(self) -> str:
        """SHA-256 of its bytes now; of a file on this machine, from the cache of digests.

        Raises:
            InputError: It cannot be read.
        """
        if self.is_local:
            return digest_file(Path(self.path))
        with self.fs.open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def is_local(self) -> bool:
        from fsspec.implementations.local import LocalFileSystem

        return isinstance(self.fs, LocalFileSystem)

    def changed(self) -> InputError:
        """The error for bytes that do not have the recorded digest."""
        return InputError(
            f"{self.given} changed while it was read, and nothing of it was kept. Run again when nothing "
            "writes to it any more"
        )


@contextlib.contextmanager
def unchanged(file: SourceFile) -> Iterator[None]:
    """For a file that is not read from its beginning to its end: looks at it again afterwards.

    Raises:
        InputError: It does not have the recorded digest any more, or was written to in between.
    """
    before = _state(file)
    yield
    if file.sha256 and (_state(file) != before or file.digest() != file.sha256):
        raise file.changed()


def _state(file: SourceFile) -> tuple[int, int, int, int] | None:
    """None for a file that is gone or on another machine."""
    with contextlib.suppress(OSError):
        return file_state(os.stat(file.path)) if file.is_local else None
    return None


def _is_other(file: SourceFile) -> bool:
    """Whether under its name there is now another file, or none."""
    try:
        return file.digest() != file.sha256
    except InputError:
        return True


class _CountedStream(io.RawIOBase):
    """Hashes the bytes of the file, and reports how many were read."""

    def __init__(self, stream: IO[bytes], advance: Advance) -> None:
        self._stream, self._advance = stream, advance
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.sha256.update(data)
        self._advance(len(data))
        return len(data)


class _XzStream(io.RawIOBase):
    """Decompresses xz, which Arrow cannot. Unlike Python's own reader it refuses what follows the data."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self._decoder = stream, lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decoder.eof:  # the next of several streams, after a padding of zeros
                data = (self._decoder.unused_data or self._stream.read(BLOCK)).lstrip(b"\0")
                if not data and not self._stream.peek(1):
                    return 0
                self._decoder = lzma.LZMADecompressor()
            elif self._decoder.needs_input and not (data := self._stream.read(BLOCK)):
                raise OSError("Truncated xz stream")
            try:
                found = self._decoder.decompress(data, len(buffer))
            except lzma.LZMAError as error:
                raise OSError(str(error)) from error
            if found:
                buffer[: len(found)] = found
                return len(found)


@contextlib.contextmanager
def open_stream(
    file: SourceFile, advance: Advance = lambda _: None, *, whole: bool = True
) -> Iterator[io.BufferedReader]:
    """The file's decompressed bytes.

    Args:
        whole: False for a look at the beginning.

    Raises:
        InputError: It cannot be opened, or is UTF-16, or (while reading) truncated or corrupt, or (on
            leaving) the bytes that were read are not those of the recorded digest.
    """
    import pyarrow as pa

    before = _state(file)
    with contextlib.ExitStack() as stack:
        try:
            raw: Any = _CountedStream(stack.enter_context(file.fs.open(file.path, "rb")), advance)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot open {file.given}: {error}") from error
        stream = counted = io.BufferedReader(raw, BLOCK)
        if file.codec:
            if not counted.peek(1):  # Arrow would take it for an empty file
                raise InputError(f"{file.given}: truncated {file.codec} file (it is empty): copy it again")
            if file.codec == "xz":
                decompressed: Any = _XzStream(counted)
            else:
                decompressed = pa.CompressedInputStream(pa.PythonFile(counted, "r"), file.codec)
            stream = io.BufferedReader(decompressed, BLOCK)
        with _explain(file, lambda: 0):
            start = stream.peek(2)[:2]
        if start in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(
                f"{file.given} is UTF-16: convert it, for example with `iconv -f UTF-16 -t UTF-8`"
            )
        yield stream
        if whole and file.sha256:
            while counted.read(BLOCK):
                pass
            if raw.sha256.hexdigest() != file.sha256 or (_state(file) != before and _is_other(file)):
                raise file.changed()


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

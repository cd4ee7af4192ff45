"""Rows of a .json file: an array of objects, an object that holds one array of objects, one object, or JSON
lines.

An array is read one element at a time, so its size does not matter. An element that is not JSON becomes a
reject; a document that does not hold together (no closing bracket, two arrays of rows) is an error of the
file.
"""

import codecs
import re
from collections.abc import Container, Generator, Iterator
from itertools import islice
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.decode import Reject, Row, reject, to_row
from sft_pipeline.stages.raw_rows.streams import Advance, SourceFile, open_stream, read_chunks
from sft_pipeline.tables.reasons import MAX_LINE, RejectReason
from sft_pipeline.tables.strict_json import InvalidJson, parse, parse_at

_WHITE = re.compile(r"[ \t\r\n]*")
# A whole string (or one that the buffer's end cuts off), or a character of structure.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)
_MESSAGE_KEYS = {"role", "from", "content"}
_TOOLS = {"tools", "functions"}  # fields of one row, though they are lists of objects


def looks_like_lines(file: SourceFile) -> bool:
    """Whether a .json file is in fact JSON lines: its first line is a whole object and more follows."""
    with open_stream(file, whole=False) as stream:
        lines = (
            line.strip().removeprefix(b"\xef\xbb\xbf")
            for line in iter(lambda: stream.readline(MAX_LINE), b"")
        )
        try:
            first, second = islice((line for line in lines if line), 2)
        except (
            ValueError,
            OSError,
        ):  # fewer than two lines, or unreadable, which is reported when it is read
            return False
    if not first.startswith(b"{"):
        return False
    return _is_object(first) or (first[-1:] not in b"[{:," and _is_object(second))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse(line.decode("utf-8", "surrogateescape")), dict)
    except InvalidJson as invalid:
        return invalid.reason is not RejectReason.INVALID_JSON


def read_document(
    file: SourceFile, advance: Advance, row_fields: Container[str] = ()
) -> Iterator[Row | Reject]:
    """The rows of one JSON document.

    Args:
        row_fields: Names of lists of objects that are fields of one row.

    Raises:
        InputError: The document is cut off or holds no rows in a known place; names file and line.
    """
    with open_stream(file, advance) as stream:
        text = _JsonWindow(stream, file)
        start = text.peek()
        if start == "[":
            yield from text.elements()
            text.must_end()
            return
        if start != "{":
            raise text.error("is neither a JSON array nor an object" if start else "is empty")
        found = yield from _array_in_object(text, row_fields)
    if not found:
        yield from _whole(file)


def _array_in_object(text: "_JsonWindow", row_fields: Container[str]) -> Generator[Row | Reject, None, bool]:
    """Yields the rows of the one array of objects in an object; returns whether there was one."""
    text.take("{")
    found = False
    while text.peek() == '"':
        name, _, _ = text.value()
        text.take(":")
        kind = text.array_of() if text.peek() == "[" else "values"
        if kind != "values" and found:
            raise text.error(f"holds a second list of objects, {name!r}: put the rows into one list")
        if kind == "messages" or (kind == "rows" and (name in _TOOLS or name in row_fields)):
            return False
        if kind == "rows":
            found = True
            yield from text.elements()
        else:
            text.value()
        if text.peek() != ",":
            break
        text.take(",")
    text.take("}")
    text.must_end()
    return found


def _whole(file: SourceFile) -> Iterator[Row | Reject]:
    """A document that is one row."""
    with open_stream(file) as stream:
        data = stream.read(MAX_LINE + 1)
    if len(data) > MAX_LINE:
        raise InputError(
            f"{file.given} is one JSON object of more than {MAX_LINE >> 20} MiB and not a list of rows: "
            "write one row per line (.jsonl)"
        )
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    try:
        yield to_row(1, parse(text), text)
    except InvalidJson as invalid:
        yield reject(1, invalid.reason, data)


class _JsonWindow:
    """A window on the document's text that moves forward and knows its line."""

    def __init__(self, stream: Any, file: SourceFile) -> None:
        self.file = file
        self._chunks = read_chunks(stream, file, lambda: self._line)
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
        self._text, self._at, self._ended = "", 0, False
        self._line, self._counted = 1, 0  # `_line` is the line of position `_counted`
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    @property
    def line(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def error(self, what: str) -> InputError:
        return InputError(f"{self.file.given}, line {self.line}: the document {what}")

    def _more(self) -> bool:
        """Reads at least as much again as is waiting, so that a long element is not scanned too often."""
        if self._ended:
            return False
        _ = self.line
        parts = [self._text[self._at :]]
        self._at = self._counted = 0
        want = max(1, len(parts[0]))
        while want > 0:
            data = next(self._chunks, None)
            if data is None:
                parts.append(self._decode(b"", True))
                self._ended = True
                break
            parts.append(self._decode(data))
            want -= len(data)
        self._text = "".join(parts)
        return True

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            self._at = _WHITE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(
                f"is truncated or broken: expected {character!r} here. Copy it again, or write one row per "
                "line (.jsonl)"
            )
        self._at += 1

    def must_end(self) -> None:
        if self.peek():
            raise self.error("has more text after its end: write one row per line (.jsonl)")

    def value(self) -> tuple[Any, InvalidJson | None, str]:
        """Takes the next value (after `peek`): the value, or why it is none, and its text."""
        while True:
            invalid: InvalidJson | None = None
            end: int | None
            try:
                value, end = parse_at(self._text, self._at)
                if end == len(self._text) and self._text[end - 1] not in '"]}' and self._more():
                    continue  # a number may go on
            except InvalidJson as problem:
                value, invalid, end = None, problem, self._end_of_value(self._at)
            if end is not None:
                text = self._text[self._at : end]
                self._at = end
                return value, invalid, text
            if len(self._text) - self._at > MAX_LINE:
                raise self.error(
                    f"has an element of more than {MAX_LINE >> 20} MiB, or a quote or bracket that never "
                    "closes"
                )
            if not self._more():
                raise self.error(
                    "is truncated in the element that begins here, or a quote or bracket in it never closes. "
                    "Copy the file again, or correct the element"
                )

    def _end_of_value(self, start: int) -> int | None:
        """Where a value that does not parse ends, by brackets and quotes; None if the window ends first."""
        depth = 0
        for token in _TOKEN.finditer(self._text, start):
            mark = token[0]
            if mark in "{[":
                depth += 1
            elif mark in "]}":
                depth -= 1
                if depth < 0:
                    return token.start()
            elif mark == "," and depth == 0:
                return token.start()
            elif mark[0] == '"' and (len(mark) == 1 or mark[-1] != '"'):
                return None
        return None

    def elements(self) -> Iterator[Row | Reject]:
        """Takes an array, a row for each element."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.peek()
            line = self.line
            value, invalid, text = self.value()
            yield reject(line, invalid.reason, text) if invalid else to_row(line, value, text)
            if self.peek() != ",":
                break
            self.take(",")
        self.take("]")

    def array_of(self) -> str:
        """What the array that comes next holds, by its first element and without taking it.

        "rows" (objects), "messages" (the turns of one conversation) or "values".
        """
        while True:
            at = _WHITE.match(self._text, self._at + 1).end()  # type: ignore[union-attr]
            if at < len(self._text):
                if self._text[at] != "{":
                    return "values"
                try:
                    value, _ = parse_at(self._text, at)
                    return "messages" if _MESSAGE_KEYS & value.keys() else "rows"
                except InvalidJson:
                    if self._end_of_value(at) is not None:
                        return "rows"
            if len(self._text) - self._at > MAX_LINE or not self._more():
                return "rows"

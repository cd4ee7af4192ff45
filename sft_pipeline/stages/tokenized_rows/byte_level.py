"""What is known of a byte-level BPE tokenizer: how it cuts plain text, and the bytes that each id stands for.

Such a tokenizer cuts text into pieces (words, mostly) with regular expressions and merges the bytes of each piece by
itself. For plain text (ASCII without odd control characters) the expressions can be written for Python's `re` exactly;
of other text nothing is claimed here, nor of other kinds of tokenizer.
"""

import json
import re
import unicodedata
from typing import Any

import numpy as np
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.boundaries import covering
from sft_pipeline.text.tokenizer import Tokenizer

ODD_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
"""Control characters on whose class (white space or not) regular expression engines differ."""

# What the ByteLevel pre-tokenizer cuts with (openai/gpt-2, encoder.py).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_COMPOSING = {"NFC", "NFD", "NFKC", "NFKD"}  # normalizers that leave ASCII as it is


class Unsupported(Exception):
    """Why a tokenizer has to be left to the reference."""


class ByteLevel:
    """A byte-level BPE tokenizer that treats plain text without added tokens alike wherever it stands.

    Attributes:
        patterns: What cuts such text, one after the other, for Python's `re` with re.ASCII; each covers all of it.
        bytes_of: pa.BinaryArray, id -> the bytes that it stands for. Ids that stand for none are empty.
        byte_lengths: int64, their lengths.

    Raises:
        Unsupported: The tokenizer is of another kind; the message says what is in the way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend = tokenizer.backend
        _require_plain_model(backend.model)
        _require_composing(_state(backend.normalizer))
        flagged = [
            t.content
            for t in backend.get_added_tokens_decoder().values()
            if t.lstrip or t.rstrip or t.single_word
        ]
        if flagged:
            raise Unsupported(f"added tokens that take in what is around them, for example {flagged[0]!r}")
        if tokenizer.needs_context:
            raise Unsupported("text encodes differently at the beginning")
        self.patterns = _patterns(_state(backend.pre_tokenizer))
        self.bytes_of = _bytes_of_ids(tokenizer)
        self.byte_lengths = np.diff(np.frombuffer(self.bytes_of.buffers()[1], np.int32)).astype(np.int64)

    def text_of(self, ids: np.ndarray) -> bytes:
        """The bytes that ids stand for, end to end."""
        if not len(ids):
            return b""
        _, offsets, data = self.bytes_of.take(pa.array(ids)).buffers()
        return data.slice(0, int(np.frombuffer(offsets, np.int32)[len(ids)])).to_pybytes()


def byte_symbols() -> dict[int, int]:
    """Byte -> code point of the printable character that byte-level vocabularies write for it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: b for b in printable} | {b: 256 + i for i, b in enumerate(others)}


def _bytes_of_ids(tokenizer: Tokenizer) -> pa.BinaryArray:
    tokens = [token or "" for token in tokenizer.tokens]
    for (
        token,
        i,
    ) in tokenizer.added.items():  # these stand for their own text: spell it as the others are spelled
        tokens[i] = token.encode().decode("latin-1").translate(byte_symbols())
    try:
        bytes_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        data = "".join(tokens).translate(bytes_of).encode("latin-1")
    except UnicodeEncodeError as error:
        raise Unsupported(f"the vocabulary is not byte-level: it has {error.object[error.start]!r}") from None
    offsets = np.zeros(len(tokens) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, tokens), np.int32, len(tokens)), out=offsets[1:])
    return pa.BinaryArray.from_buffers(
        pa.binary(), len(tokens), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def _state(component: Any) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return None if component is None else json.loads(component.__getstate__())


def _require_plain_model(model: Any) -> None:
    if type(model).__name__ != "BPE":
        raise Unsupported(f"its model is {type(model).__name__}, not BPE")
    for name in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
    ):
        if getattr(model, name):
            raise Unsupported(f"its model has {name}")


def _require_composing(state: dict[str, Any] | None) -> None:
    for part in [] if state is None else state.get("normalizers", [state]):
        if part["type"] not in _COMPOSING:
            raise Unsupported(f"its normalizer {part['type']} may alter plain text")


def _patterns(state: dict[str, Any] | None) -> list[str]:
    """What cuts the text, one after the other, for Python's `re` with re.ASCII."""
    parts = [] if state is None else state.get("pretokenizers", [state])
    if not parts or parts[-1]["type"] != "ByteLevel":
        raise Unsupported("its pre-tokenizer does not end in ByteLevel")
    found = []
    for part in parts:
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            raise Unsupported("it adds a space before the first word")
        if part["type"] == "ByteLevel":
            found += [ascii_pattern(_GPT2)] if part["use_regex"] else []
        elif part["type"] == "Digits":
            found.append("[0-9]|[^0-9]+" if part["individual_digits"] else "[0-9]+|[^0-9]+")
        elif part["type"] == "Split" and (part["behavior"], part["invert"]) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            literal = part["pattern"].get("String")
            pattern = ascii_pattern(part["pattern"]["Regex"]) if literal is None else re.escape(literal)
            try:
                # An inverted pattern names the pieces themselves.
                found.append(pattern if part["invert"] else covering(pattern))
            except re.error as error:
                raise Unsupported(f"its regular expression is not one of Python's: {error}") from None
        else:
            raise Unsupported(f"its pre-tokenizer has {part['type']}")
    return found or ["(?s:.+)"]


def ascii_pattern(pattern: str) -> str:
    r"""A regular expression of tokenizer.json for Python's `re`, equal on ASCII text: \p{L} and the like written out.

    Raises:
        Unsupported: It uses something else that Python's `re` reads otherwise.
    """
    out, i, in_class = [], 0, False
    while i < len(pattern):
        c = pattern[i]
        if c == "\\" and pattern[i + 1 : i + 2] in ("p", "P"):
            end = pattern.index("}", i)
            members = _members(pattern[i + 3 : end], negated=pattern[i + 1] == "P")
            out.append(members if in_class else f"[{members}]" if members else "(?!)")
            i = end + 1
            continue
        if c == "\\":
            if pattern[i + 1 : i + 2] not in tuple("sSdDwWrntf\\'\"/.-[](){}|?*+^$ "):
                raise Unsupported(f"its regular expression has {pattern[i : i + 2]!r}")
            out.append(pattern[i : i + 2])
            i += 2
            continue
        if in_class and (c == "[" or pattern[i : i + 2] == "&&"):
            raise Unsupported("its regular expression has set operations")
        in_class = c == "[" or (in_class and c != "]")
        out.append(c)
        i += 1
    return "".join(out).replace("[]", "(?!)")


def _members(category: str, *, negated: bool) -> str:
    """The ASCII characters of a Unicode category, escaped for a character class."""
    return "".join(
        re.escape(chr(c)) for c in range(128) if unicodedata.category(chr(c)).startswith(category) != negated
    )

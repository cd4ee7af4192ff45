"""Byte-level BPE, several times faster than its reference and with the same ids.

Such a tokenizer cuts text into pieces (words, mostly) with regular expressions and merges the bytes of each piece by
itself. Text repeats its words: each distinct piece is merged once, by the tokenizer's own model, and looked up ever
after. Only plain text goes this way (ASCII without odd control characters), because there the regular expressions can
be written for Python's `re` exactly; all other text, and every other kind of tokenizer, is left to the reference.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer

MAX_PIECES = 1 << 20  # remembered; some 150 MB if it ever fills up
ODD_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
"""Control characters on whose class (white space or not) regular expression engines differ."""

# What the ByteLevel pre-tokenizer cuts with (openai/gpt-2, encoder.py).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_COMPOSING = {"NFC", "NFD", "NFKC", "NFKD"}  # normalizers that leave ASCII as it is


class Unsupported(Exception):
    """Why a tokenizer has to be left to the reference."""


class Pieces(dict[str, bytes]):
    """Piece -> its token ids as int32 bytes; merged by the tokenizer's model when first asked for."""

    def __init__(self, model: Any, symbols: dict[int, int]) -> None:
        super().__init__()
        self._model, self._symbols = model, symbols

    def __missing__(self, piece: str) -> bytes:
        tokens = self._model.tokenize(piece.translate(self._symbols))
        ids = np.array([t.id for t in tokens], dtype=np.int32).tobytes()
        if len(self) < MAX_PIECES:
            self[piece] = ids
        return ids


class PieceEncoder:
    """Encodes plain text that holds no added token.

    Attributes:
        patterns: What cuts the text, one after the other, for Python's `re` with re.ASCII.
        bytes_of: pa.BinaryArray, id -> the bytes that it stands for. Ids that stand for none are empty.
        byte_lengths: int64, their lengths.

    Raises:
        Unsupported: The tokenizer is of another kind; the message says what is in the way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend = tokenizer.backend
        _require_plain_model(backend.model)
        _require_composing(_state(backend.normalizer))
        flagged = [t.content for t in backend.get_added_tokens_decoder().values() if t.lstrip or t.rstrip or t.single_word]  # fmt: skip
        if flagged:
            raise Unsupported(f"added tokens that take in what is around them, for example {flagged[0]!r}")
        if tokenizer.needs_context:
            raise Unsupported("text encodes differently at the beginning")
        self.patterns = _patterns(_state(backend.pre_tokenizer))
        self._cuts = [re.compile(p, re.ASCII).findall for p in self.patterns]
        symbols = byte_symbols()
        self._get = Pieces(backend.model, symbols).__getitem__
        self.bytes_of = _bytes_of_ids(tokenizer, symbols)
        self.byte_lengths = pc.binary_length(self.bytes_of).to_numpy().astype(np.int64)

    def encode(self, text: str) -> bytes:
        """The ids of plain text (ASCII, no `ODD_CONTROL`, no added token) as int32 bytes."""
        pieces: Iterable[str] = self._cuts[0](text)
        for cut in self._cuts[1:]:
            pieces = chain.from_iterable(map(cut, pieces))
        return b"".join(map(self._get, pieces))

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


def _bytes_of_ids(tokenizer: Tokenizer, symbols: dict[int, int]) -> pa.BinaryArray:
    tokens = [""] * tokenizer.vocab_size
    for token, i in tokenizer.vocabulary.items():
        tokens[i] = token
    for i in tokenizer.added.values():
        tokens[i] = ""
    try:
        data = "".join(tokens).translate({symbol: byte for byte, symbol in symbols.items()}).encode("latin-1")
    except UnicodeEncodeError as error:
        raise Unsupported(f"the vocabulary is not byte-level: it has {error.object[error.start]!r}") from None
    offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int32)
    values = pa.Array.from_buffers(
        pa.binary(), len(tokens), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )
    texts = {i: token.encode() for token, i in tokenizer.added.items()}
    if not texts:
        return values
    added = pa.array([texts.get(i) for i in range(len(tokens))], pa.binary())
    return pc.coalesce(added, values)


def _state(component: Any) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as tokenizer.json has it."""
    return None if component is None else json.loads(component.__getstate__())


def _require_plain_model(model: Any) -> None:
    if type(model).__name__ != "BPE":
        raise Unsupported(f"its model is {type(model).__name__}, not BPE")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"):  # fmt: skip
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
        elif part["type"] == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):  # fmt: skip
            literal = part["pattern"].get("String")
            pattern = ascii_pattern(part["pattern"]["Regex"]) if literal is None else re.escape(literal)
            # An inverted pattern names the pieces themselves.
            found.append(_compiled(pattern, covering=part["invert"]))
        else:
            raise Unsupported(f"its pre-tokenizer has {part['type']}")
    return found or ["(?s:.+)"]


def _compiled(pattern: str, *, covering: bool) -> str:
    """The pattern, with what lies between its matches as pieces too where it does not match everything itself."""
    try:
        covering = covering or all(re.compile(pattern, re.ASCII).match(chr(c)) for c in range(128))
    except re.error as error:
        raise Unsupported(f"its regular expression is not one of Python's: {error}") from None
    return pattern if covering else f"{pattern}|(?s:(?:(?!{pattern}).)+)"


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

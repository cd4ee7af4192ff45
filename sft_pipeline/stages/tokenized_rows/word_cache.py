"""Token ids of many texts at once: each distinct piece is encoded once, by the tokenizer itself.

    The cat sat on 12 mats.|The cat ran.              texts, end to end
    The| cat| sat| on| 12| mats|.|The| cat| ran|.     cut where the tokenizer's pre-tokenizer always cuts
    0    1    2    3   4   5    6 0   1    7    6     numbers of the distinct pieces
    [..] [..] ...                                     their ids, cached; one Arrow gather concatenates them

A piece is then made of whole pre-tokens, and BPE never merges across them (Sennrich et al., 2016).
Where the pre-tokenizer always cuts is not derived from its regular expressions but tried on the tokenizer
itself when it is loaded: between which kinds of ASCII character (letter, digit, punctuation, space) it cuts
every time in a long random text, and whether each piece of that text is cut alone as it is within the whole.

Only the look-up of distinct pieces holds the interpreter's lock, so threads can encode batches.
"""

import json
import random
import string
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers

from sft_pipeline.text.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]

MAX_WORDS = 1 << 20  # remembered; some 150 MB if it ever fills up
LONGEST_WORD = 64  # characters of a word that is remembered: longer ones hardly come again

_OTHER, _LETTER, _DIGIT, _PUNCTUATION, _SPACE = range(5)
_TRIED = {
    _LETTER: string.ascii_letters,
    _DIGIT: string.digits,
    _PUNCTUATION: string.punctuation,
    _SPACE: " ",
    _OTHER: "\t\n\réßЖ中ั😀\u00a0\u0301",
}
_KINDS = len(_TRIED)
_KIND_OF_BYTE = bytes(
    next((kind for kind, characters in _TRIED.items() if chr(b) in characters and b < 128), _OTHER)
    for b in range(256)
)
_TRIAL = (
    25_000  # characters: each pair of ASCII characters comes about twice, each pair of kinds a thousand times
)
# Unicode normal forms change no ASCII character, and nothing across a space.
_HARMLESS_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
# Settings of a BPE model under which ids depend on chance, on neighbours, or do not spell the bytes.
_REFUSED: tuple[str, ...] = ("dropout", "unk_token", "fuse_unk", "byte_fallback")
_REFUSED += ("continuing_subword_prefix", "end_of_word_suffix")


class NoFastPath(Exception):
    """Why the fast encoder cannot be used; the reference encodes all rows instead."""


@dataclass(frozen=True)
class EncodedTexts:
    """Texts, encoded.

    Attributes:
        ids: int32 (tokens,), of all texts end to end.
        ends: int64 (texts + 1,): tokens before each text, and in all.
        faithful: bool (texts,): whether the ids stand for exactly the bytes of the text.
    """

    ids: npt.NDArray[np.int32]
    ends: Ints
    faithful: npt.NDArray[np.bool_]


class WordCache:
    """Encodes arrays of texts under one byte-level BPE tokenizer. May be used by several threads.

    Attributes:
        bytes_of: pa.BinaryArray, id -> the bytes that it stands for; empty for an id without a token.
        byte_lengths: int64 (vocabulary,), their lengths.

    Raises:
        NoFastPath: The tokenizer is of another kind; the message says what is in the way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        _require_byte_level_bpe(tokenizer)
        self._cut_between = _where_it_cuts(tokenizer.backend)
        self._encode_batch = tokenizer.backend.encode_batch_fast
        self.bytes_of = _bytes_of_ids(tokenizer)
        self.byte_lengths = np.diff(np.frombuffer(self.bytes_of.buffers()[1], np.int32)).astype(np.int64)
        self._ids_of = {token: array("i", [i]).tobytes() for token, i in tokenizer.added.items()}

    def encode(self, texts: pa.StringArray, is_added: npt.NDArray[np.bool_]) -> EncodedTexts:
        """The ids of each text, as if it were encoded alone.

        Args:
            texts: None of them empty, less than 2 GiB in all.
            is_added: bool (texts,), which of them are added tokens. The others hold none.
        """
        data, starts = text_bytes(texts)
        kinds = np.frombuffer(data.translate(_KIND_OF_BYTE), np.uint8)
        cut = np.empty(len(kinds), dtype=bool)
        # bytes.translate looks up several times faster than an index into an array.
        pairs = kinds[:-1] * np.uint8(_KINDS) + kinds[1:]
        cut[1:] = np.frombuffer(pairs.tobytes().translate(self._cut_between), bool)
        cut &= np.repeat(~is_added, np.diff(starts))
        cut[starts[:-1]] = True
        begins = np.append(np.flatnonzero(cut), len(data))
        words = pa.StringArray.from_buffers(
            len(begins) - 1, pa.py_buffer(begins.astype(np.int32)), pa.py_buffer(data)
        ).dictionary_encode()
        ids_of_words = pa.array(self._look_up(words.dictionary.to_pylist()), pa.binary())
        _, offsets, ids = ids_of_words.take(words.indices).buffers()
        first_word = np.searchsorted(begins, starts)  # of each text, and the number of all
        ends = np.frombuffer(offsets, np.int32, len(begins))[first_word].astype(np.int64) // 4
        faithful = np.ones(len(texts), dtype=bool)
        altered = self._altered(words.dictionary, ids_of_words)
        if len(altered):
            bad = np.isin(words.indices.to_numpy(), altered)
            faithful = np.add.reduceat(bad, first_word[:-1], dtype=np.int64) == 0
        return EncodedTexts(np.frombuffer(ids, np.int32, int(ends[-1])), ends, faithful)

    def bytes_for(self, ids: npt.NDArray[np.int32]) -> bytes:
        """The bytes that ids stand for, end to end."""
        if not len(ids):
            return b""
        _, offsets, data = self.bytes_of.take(pa.array(ids)).buffers()
        return data.slice(0, int(np.frombuffer(offsets, np.int32)[len(ids)])).to_pybytes()

    def _look_up(self, words: list[str]) -> list[bytes]:
        known = self._ids_of.get
        found = [known(word) for word in words]
        missing = [i for i, ids in enumerate(found) if ids is None]
        for i, ids in zip(missing, self._encode([words[i] for i in missing]), strict=True):
            found[i] = ids
            if len(words[i]) <= LONGEST_WORD and len(self._ids_of) < MAX_WORDS:
                self._ids_of[words[i]] = ids
        return found  # type: ignore[return-value]

    def _encode(self, words: list[str]) -> list[bytes]:
        return [array("i", e.ids).tobytes() for e in self._encode_batch(words, add_special_tokens=False)]

    def _altered(self, words: pa.StringArray, ids_of_words: pa.BinaryArray) -> Ints:
        """Numbers of the words whose ids do not stand for exactly their bytes: a normalizer composed them."""
        ids = np.frombuffer(ids_of_words.buffers()[2] or b"", np.int32)
        if self.bytes_for(ids) == text_bytes(words)[0]:
            return np.zeros(0, np.int64)
        spelled = [self.bytes_for(np.frombuffer(b, np.int32)) for b in ids_of_words.to_pylist()]
        pairs = zip(spelled, words.to_pylist(), strict=True)
        return np.array([i for i, (octets, word) in enumerate(pairs) if octets != word.encode()])


def text_bytes(texts: pa.StringArray) -> tuple[bytes, Ints]:
    """The texts' bytes end to end, and int64 (texts + 1,): where each begins, and where the last one ends."""
    _, offsets, data = texts.buffers()
    at = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    begin, end = (int(at[0]), int(at[-1])) if len(at) else (0, 0)
    return (data.slice(begin, end - begin).to_pybytes() if data else b""), at - begin


def running_totals(counts: Sequence[int] | npt.NDArray) -> Ints:
    """int64 (counts + 1,): totals before each count, and in all."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _require_byte_level_bpe(tokenizer: Tokenizer) -> None:
    """Raises NoFastPath where ids may depend on more than the piece of text that they stand for."""
    backend = tokenizer.backend
    if type(backend.model).__name__ != "BPE":
        raise NoFastPath(f"its model is {type(backend.model).__name__}, not BPE")
    for name in _REFUSED:
        if getattr(backend.model, name):
            raise NoFastPath(f"its model has {name}")
    for part in _parts(backend.normalizer, "normalizers"):
        if part["type"] not in _HARMLESS_NORMALIZERS:
            raise NoFastPath(f"its normalizer {part['type']} may alter plain text")
    if [part["type"] for part in _parts(backend.pre_tokenizer, "pretokenizers")][-1:] != ["ByteLevel"]:
        raise NoFastPath("its pre-tokenizer does not end in ByteLevel")
    if tokenizer.needs_context:
        raise NoFastPath("text encodes differently at the beginning")
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or " " in token.content:
            raise NoFastPath(f"added tokens that take in what is around them, for example {token.content!r}")


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json has them."""
    state = None if component is None else json.loads(component.__getstate__())
    return [] if state is None else state.get(name, [state])


def _where_it_cuts(backend: tokenizers.Tokenizer) -> bytes:
    """For each pair of kinds (first * _KINDS + second) 1 where text may be cut between the two.

    Raises:
        NoFastPath: Not even between a word and the space behind it.
    """
    generator = random.Random(0)
    kinds = generator.choices(list(_TRIED), (5, 3, 5, 4, 2), k=_TRIAL)
    text = "".join(generator.choice(_TRIED[kind]) for kind in kinds)
    text += " it's I'LL we've THEY'RE a.b 1,234.5 (x) $7 ...   12345 x"
    whole = backend.pre_tokenizer.pre_tokenize_str(text)
    is_cut = np.zeros(len(text) + 1, dtype=bool)
    is_cut[[start for _, (start, _) in whole]] = True
    found = np.array([next(k for k, characters in _TRIED.items() if c in characters) for c in text])
    pairs = found[:-1] * _KINDS + found[1:]
    # Other characters are too many to be tried; white space looks at what follows it (\s+(?!\S)).
    never = {(first, k) for first in (_OTHER, _SPACE) for k in range(_KINDS)}
    never |= {(k, _OTHER) for k in range(_KINDS)}
    uncut = np.unique(pairs[~is_cut[1:-1]])
    always = {divmod(int(p), _KINDS) for p in np.setdiff1d(pairs, uncut)}
    before_spaces = {(k, _SPACE) for k in (_LETTER, _DIGIT, _PUNCTUATION)}
    for allowed in (always - never, before_spaces):
        table = np.zeros(256, np.uint8)
        table[[first * _KINDS + second for first, second in allowed]] = 1
        begins = [0, *(np.flatnonzero(table[pairs]) + 1).tolist(), len(text)]
        pieces = (text[begin:end] for begin, end in pairwise(begins))
        # Other rules may look on too, so what counts is that each piece is cut alone as within the whole.
        alone = [token for piece in pieces for token, _ in backend.pre_tokenizer.pre_tokenize_str(piece)]
        if before_spaces <= allowed and alone == [token for token, _ in whole]:
            return table.tobytes()
    raise NoFastPath("its pre-tokenizer does not always cut before a space")


def byte_symbols() -> dict[int, int]:
    """Byte -> code point of the character that byte-level vocabularies write for it (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {b: b for b in printable} | {b: 256 + i for i, b in enumerate(others)}


def _bytes_of_ids(tokenizer: Tokenizer) -> pa.BinaryArray:
    """Id -> the bytes that it stands for; raises NoFastPath where a token does not spell bytes."""
    tokens = [token or "" for token in tokenizer.tokens]
    symbols = byte_symbols()
    for token, i in tokenizer.added.items():  # they stand for their own text: spell it as the others are
        tokens[i] = token.encode().decode("latin-1").translate(symbols)
    try:
        bytes_of = {symbol: byte for byte, symbol in symbols.items()}
        data = "".join(tokens).translate(bytes_of).encode("latin-1")
    except UnicodeEncodeError as error:
        raise NoFastPath(f"the vocabulary is not byte-level: it has {error.object[error.start]!r}") from None
    offsets = running_totals(list(map(len, tokens))).astype(np.int32)
    return pa.BinaryArray.from_buffers(
        pa.binary(), len(tokens), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )

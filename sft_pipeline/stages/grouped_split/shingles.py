"""Texts as sets of hashed word 3-grams, computed on whole batches at once.

Words are lower-cased runs of letters, marks and digits; scripts without spaces count one character as a word. A text of
one or two words is one shingle, and so is one without any word.

The words are never made into strings: they are found in the UTF-8 bytes of the batch and hashed eight bytes at a time.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

GRAM = 3
_NO_WORD = r"[^\p{L}\p{M}\p{N}\x00-\x7F]+"  # ASCII is left to _PLAIN, which is many times faster
_UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
_PLAIN = bytes(ord(chr(c).lower()) if chr(c).isalnum() else ord(" ") for c in range(128)) + bytes(
    range(128, 256)
)
TEXT_AT_ONCE = (
    1 << 20
)  # bytes; the arrays made of them are many times that, and should stay near the processor
_STEP = 8  # bytes hashed at a time
_LONG = 8 * _STEP  # longer words are rare, and hashed one by one
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(_STEP + 1)], np.uint64)
_MIX = tuple(np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def texts_of(messages: pa.ListArray) -> pa.Array:
    """The text of each row for comparison: every message but the system's, joined by a space.

    A system message is often the same in every row, and would make all of them look alike.
    """
    flat = messages.flatten()
    said, calls, by_system = flat.field("content"), flat.field("tool_calls"), is_system(flat)
    if calls.null_count < len(calls):
        said = pc.binary_join_element_wise(said, pc.fill_null(calls, ""), " ")
    if pc.any(by_system).as_py():
        said = pc.if_else(by_system, "", said)
    offsets = messages.offsets.to_numpy(zero_copy_only=False)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), said), " ")


def is_system(messages: pa.StructArray) -> pa.BooleanArray:
    """Which messages are the system's."""
    return pc.equal(messages.field("role"), "system")


def mixed(x: np.ndarray) -> np.ndarray:
    """uint64 with its bits well mixed (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers start, start + 1, ... of each (start, length), one after the other."""
    total = int(lengths.sum())
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(total)


def distinct(keys: np.ndarray) -> np.ndarray:
    """The distinct values, ascending; sorts `keys` in place. `np.unique` hashes, at several times the cost."""
    keys.sort()
    keep = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=keep[1:])
    return keys[keep]


def shingle_sets(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The set of each text.

    Returns:
        (sizes int64 [n], hashes uint32 [sum of sizes]): each text's distinct shingles in ascending order; one at least.
    """
    texts = _spelled(texts)
    step = max(1, len(texts) * TEXT_AT_ONCE // max(1, texts.nbytes))
    pieces = [_sets(texts.slice(first, step)) for first in range(0, len(texts), step)]
    sizes, hashes = zip(*pieces, (np.zeros(0, np.int64), np.zeros(0, np.uint32)))
    return np.concatenate(sizes), np.concatenate(hashes)


def _sets(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """`shingle_sets` of a few texts that are `_spelled`."""
    words, counts = _words(texts)
    grams = _grams(words)
    last = np.cumsum(counts)
    whole = np.ones(len(grams), bool)  # whether the gram that begins at a word ends within the word's text
    for back in range(1, GRAM):
        whole[(last - back)[counts >= back]] = False
    for short in range(1, GRAM):
        only = (last - short)[counts == short]
        whole[only] = True
        grams[only] = _gram([words[only + i] for i in range(short)])
    text = np.arange(len(texts), dtype=np.uint64) << np.uint64(32)
    wordless = np.flatnonzero(counts == 0)
    keys = distinct(
        np.concatenate(
            [
                np.repeat(text, counts)[whole] | (mixed(grams[whole]) >> np.uint64(32)),
                text[wordless] | _wordless(texts.take(pa.array(wordless))),
            ]
        )
    )
    sizes = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return sizes.astype(np.int64), keys.astype(np.uint32)


def _spelled(texts: pa.Array) -> pa.Array:
    """Texts with characters beyond ASCII: lower-cased, with spaces for what belongs to no word and around characters
    that are a word each. The others as they are."""
    foreign = pc.invert(pc.string_is_ascii(texts))
    if not pc.any(foreign).as_py():
        return texts
    spelled = pc.utf8_lower(texts.filter(foreign))
    for pattern, replacement in ((_UNSPACED, r" \1 "), (_NO_WORD, " ")):
        spelled = pc.replace_substring_regex(spelled, pattern, replacement)
    return pc.replace_with_mask(texts, foreign, spelled)


def _words(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The words of all texts, in order.

    Returns:
        (hashes uint64 [words], counts int64 [n]): a hash per word, the same on every machine; words per text.
    """
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts), " ")
    plain = b" " + joined.buffers()[2].to_pybytes().translate(_PLAIN) + b" " * _STEP
    within = np.frombuffer(plain, np.uint8) != ord(" ")
    edges = np.flatnonzero(within[1:] != within[:-1]) + 1
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    sizes = pc.binary_length(texts).to_numpy(zero_copy_only=False) + 1
    ends = np.searchsorted(starts, 1 + np.cumsum(sizes, dtype=np.int64))
    return _hashes(plain, starts, lengths), np.diff(ends, prepend=0)


def _hashes(plain: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each word plain[start : start + length]."""
    windows = np.ndarray(len(plain) - _STEP + 1, "<u8", plain, strides=(1,))
    hashes = mixed(windows.take(starts) & _FIRST_BYTES.take(np.minimum(lengths, _STEP)))
    left, done = np.flatnonzero((lengths > _STEP) & (lengths <= _LONG)), _STEP
    while len(left):
        more = windows[starts[left] + done] & _FIRST_BYTES[np.minimum(lengths[left] - done, _STEP)]
        hashes[left] = mixed(hashes[left] * _MIX[0] + more)
        done += _STEP
        left = left[lengths[left] > done]
    for at in np.flatnonzero(lengths > _LONG).tolist():
        hashes[at] = _hash(plain[starts[at] : starts[at] + lengths[at]], 8)
    return hashes


def _grams(words: np.ndarray) -> np.ndarray:
    """The shingle that begins at each word, also across the ends of texts (uint64)."""
    padded = np.concatenate([words, np.zeros(GRAM - 1, np.uint64)])
    return _gram([padded[i : len(words) + i] for i in range(GRAM)])


def _gram(words: Sequence[np.ndarray]) -> np.ndarray:
    """Shingles from the hashes of their first, second, ... words (uint64)."""
    gram = words[0] * _MIX[0]
    for word, mix in zip(words[1:], _MIX[1:]):
        gram += word * mix
    return gram


def _wordless(texts: pa.Array) -> np.ndarray:
    """The one shingle of each text without a letter or digit: its own characters (32 bits in uint64)."""
    return np.array([_hash(" ".join(t.split()).encode(), 4) for t in texts.to_pylist()], np.uint64)


def _hash(data: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")


def jaccard(one: str, other: str) -> float:
    """The exact similarity of two texts, for tests and reports."""
    sets: Sequence[set[int]] = [set(shingle_sets(pa.array([t]))[1].tolist()) for t in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

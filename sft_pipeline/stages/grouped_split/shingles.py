"""Texts as sets of hashed word 3-grams, computed on whole batches at once.

Words are lower-cased runs of letters, marks and digits; scripts without spaces count one character as a word. A text of
one or two words is one shingle.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

GRAM = 3
_NO_WORD = r"[^\p{L}\p{M}\p{N}]+"
_UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
_MIX = tuple(np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def texts_of(messages: pa.ListArray) -> pa.Array:
    """The text of each row for comparison: every message but the system's, joined by a space.

    A system message is often the same in every row, and would make all of them look alike.
    """
    flat = messages.flatten()
    said = pc.binary_join_element_wise(flat.field("content"), pc.fill_null(flat.field("tool_calls"), ""), " ")
    said = pc.if_else(pc.equal(flat.field("role"), "system"), "", said)
    offsets = messages.offsets.to_numpy(zero_copy_only=False)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), said), " ")


def _words(texts: pa.Array) -> pa.ListArray:
    spaced = pc.utf8_lower(texts)
    if not pc.all(pc.string_is_ascii(spaced)).as_py():
        spaced = pc.replace_substring_regex(spaced, _UNSPACED, r" \1 ")
    spaced = pc.utf8_trim_whitespace(pc.replace_substring_regex(spaced, _NO_WORD, " "))
    # A text without any letter or digit still has to be compared: by its own characters.
    spaced = pc.if_else(pc.equal(spaced, ""), pc.utf8_trim_whitespace(texts), spaced)
    return pc.utf8_split_whitespace(spaced)


def _hashes(words: pa.Array) -> np.ndarray:
    """A 64-bit hash per word that is the same on every machine (uint64)."""
    encoded = words.dictionary_encode()
    distinct = np.array(
        [
            int.from_bytes(hashlib.blake2b(w.encode(), digest_size=8).digest(), "little")
            for w in encoded.dictionary.to_pylist()
        ],
        dtype=np.uint64,
    )
    return distinct[encoded.indices.to_numpy(zero_copy_only=False)]


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
        (sizes int64 [n], hashes uint32 [sum of sizes]): each text's distinct shingles in ascending order.
    """
    if not len(texts):
        return np.zeros(0, np.int64), np.zeros(0, np.uint32)
    words = _words(texts)
    offsets = words.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    counts = np.diff(offsets)
    hashes = _hashes(words.flatten())
    size = np.minimum(counts, GRAM)
    starts = ranges(offsets[:-1] - offsets[0], counts - size + 1)
    size = np.repeat(size, counts - size + 1)
    grams = np.zeros(len(starts), np.uint64)
    for i in range(GRAM):
        grams += np.where(
            size > i,
            mixed(hashes[np.minimum(starts + i, len(hashes) - 1)] + np.uint64(i)) * _MIX[i],
            np.uint64(0),
        )
    rows = np.repeat(np.arange(len(texts), dtype=np.uint64), counts - np.minimum(counts, GRAM) + 1)
    keys = distinct((rows << np.uint64(32)) | (mixed(grams) >> np.uint64(32)))
    sizes = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return sizes.astype(np.int64), keys.astype(np.uint32)


def jaccard(one: str, other: str) -> float:
    """The exact similarity of two texts, for tests and reports."""
    sets: Sequence[set[int]] = [set(shingle_sets(pa.array([t]))[1].tolist()) for t in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

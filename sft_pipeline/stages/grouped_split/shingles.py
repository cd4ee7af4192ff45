"""Texts as sets of hashed word 3-grams, computed on whole batches at once and kept on disk.

Words are lower-cased runs of letters, marks and digits; scripts without spaces count one character as a word.
A text of one or two words is one shingle, and so is one without any word.

The words are never made into strings: they are found in the UTF-8 bytes of the batch and hashed eight bytes
at a time.

    texts --words--> hashes --3-grams--> a set per row, on disk; in memory its size and node
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.workers import threaded_map

GRAM = 3
_NO_WORD = r"[^\p{L}\p{M}\p{N}\x00-\x7F]+"  # ASCII is left to _PLAIN, which is many times faster
_UNSPACED = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
_LOWER = bytes(ord(chr(c).lower()) if chr(c).isalnum() else ord(" ") for c in range(128))
_PLAIN = _LOWER + bytes(range(128, 256))
TEXT_AT_ONCE = (
    1 << 20
)  # bytes; the arrays made of them are many times that, and should stay in the CPU's caches
_STEP = 8  # bytes hashed at a time
_LONG = 8 * _STEP  # longer words are rare, and hashed one by one
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(_STEP + 1)], np.uint64)
_MIX = tuple(np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))
FREQUENCY_SLOTS = 1 << 22
_SLOT = np.uint32(FREQUENCY_SLOTS - 1)
ELEMENTS_AT_ONCE = 1 << 20
LONG_SET = 2_048  # sets from this size on are compared one pair at a time
THREADS = min(4, os.cpu_count() or 1)


def texts_of(messages: pa.ListArray) -> pa.Array:
    """The text of each row for comparison: every message except the system's, joined by a space.

    A system message is often the same in every row, and would make all of them look alike.
    """
    flat = messages.flatten()
    texts, calls, by_system = flat.field("content"), flat.field("tool_calls"), is_system(flat)
    if calls.null_count < len(calls):
        texts = pc.binary_join_element_wise(texts, pc.fill_null(calls, ""), " ")
    if pc.any(by_system).as_py():
        texts = pc.if_else(by_system, "", texts)
    offsets = messages.offsets.to_numpy(zero_copy_only=False)
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), texts), " ")


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
    """The distinct values, ascending; sorts `keys` in place. `np.unique` costs several times as much."""
    keys.sort()
    keep = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=keep[1:])
    return keys[keep]


def shingle_sets(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The set of each text.

    Returns:
        (sizes int64 [n], hashes uint32 [sum of sizes]): each text's distinct shingles in ascending order, at
        least one.
    """
    texts = _normalized(texts)
    step = max(1, len(texts) * TEXT_AT_ONCE // max(1, texts.nbytes))
    pieces = [_shingle_sets(texts.slice(first, step)) for first in range(0, len(texts), step)]
    sizes, hashes = zip(*pieces, (np.zeros(0, np.int64), np.zeros(0, np.uint32)))
    return np.concatenate(sizes), np.concatenate(hashes)


def _shingle_sets(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """`shingle_sets` of a few texts that are `_normalized`."""
    words, counts = _words(texts)
    # The shingle that begins at each word, at first also across the ends of texts.
    padded = np.concatenate([words, np.zeros(GRAM - 1, np.uint64)])
    grams = _gram([padded[i : len(words) + i] for i in range(GRAM)])
    last = np.cumsum(counts)
    whole = np.ones(len(grams), bool)  # whether the gram that begins at a word ends within the word's text
    for back in range(1, GRAM):
        whole[(last - back)[counts >= back]] = False
    for short in range(1, GRAM):
        only = (last - short)[counts == short]
        whole[only] = True
        grams[only] = _gram([words[only + i] for i in range(short)])
    text = np.arange(len(texts), dtype=np.uint64) << np.uint64(32)
    with_words = np.repeat(text, counts)[whole] | (mixed(grams[whole]) >> np.uint64(32))
    # The one shingle of a text without a letter or digit is made of its own characters.
    wordless = np.flatnonzero(counts == 0)
    signs = [_hash(" ".join(t.split()).encode(), 4) for t in texts.take(pa.array(wordless)).to_pylist()]
    keys = distinct(np.concatenate([with_words, text[wordless] | np.array(signs, np.uint64)]))
    sizes = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return sizes.astype(np.int64), keys.astype(np.uint32)


def _normalized(texts: pa.Array) -> pa.Array:
    """Texts with characters beyond ASCII lower-cased, with spaces for what belongs to no word and around
    characters that are a word each; texts of ASCII alone as they are.
    """
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


def _gram(words: Sequence[np.ndarray]) -> np.ndarray:
    """Shingles from the hashes of their first, second, ... words (uint64)."""
    gram = words[0] * _MIX[0]
    for word, mix in zip(words[1:], _MIX[1:]):
        gram += word * mix
    return gram


def _hash(data: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")


def jaccard(one: str, other: str) -> float:
    """The exact similarity of two texts, for tests."""
    sets = [set(shingle_sets(pa.array([t]))[1].tolist()) for t in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


class ShingleSets:
    """The shingle set of every row, kept on disk; some 30 bytes per row in memory.

    Attributes:
        node: For each row, the index of the first row with an equal set (int64 [rows]).
        size: Shingles of each row (int64 [rows]).
    """

    def __init__(self, texts: Iterable[pa.Array], folder: Path, threads: int | None = None) -> None:
        """
        Args:
            texts: The rows' texts, batch by batch.
            folder: Scratch space, emptied first; it must outlive the sets.
            threads: Batches shingled at a time, THREADS by default. The result does not depend on it.
        """
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._path = folder / "shingles.u32"
        sizes, signatures = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)]
        frequency = np.zeros(FREQUENCY_SLOTS, np.uint32)
        with self._path.open("wb") as stream:
            # Threads suffice, as NumPy and Arrow release the GIL.
            for _, found in threaded_map(_sets_of_batch, texts, threads or THREADS):
                size, hashes, signature = found
                hashes.tofile(stream)
                sizes.append(size)
                signatures.append(signature)
                # Shingles that share a slot look more frequent than they are: that costs speed, never a pair.
                np.add.at(frequency, hashes & _SLOT, np.uint32(1))
        self._rarity = np.minimum(frequency, 0xFFFF).astype(np.uint16)
        self.size = np.concatenate(sizes)
        self._start = np.cumsum(self.size) - self.size
        self.node = _first_equal(self.size, np.concatenate(signatures))

    def __len__(self) -> int:
        return len(self.size)

    @cached_property
    def _mapped(self) -> np.ndarray:
        """All sets end to end, memory-mapped."""
        return np.asarray(np.memmap(self._path, np.uint32, "r"))

    def read(self, first: int, last: int) -> np.ndarray:
        """The hashes of the rows [first, last), read from the disk (uint32)."""
        count = int(self.size[first:last].sum())
        return np.fromfile(self._path, np.uint32, count, offset=4 * int(self._start[first]) if count else 0)

    def rarity(self, hashes: np.ndarray) -> np.ndarray:
        """How often shingles occur, about: a rare one has a small number (uint16)."""
        return self._rarity[hashes & _SLOT]

    def similarity(self, one: np.ndarray, other: np.ndarray, threshold: float) -> np.ndarray:
        """The exact Jaccard similarity of pairs of rows (float64); 0 where it is below the threshold."""
        if not len(one):
            return np.zeros(0)
        hashes = self._mapped
        a, b = self.size[one], self.size[other]
        long = np.minimum(a, b) >= LONG_SET
        common = np.zeros(len(one), np.int64)
        for at in np.flatnonzero(long).tolist():
            x, y = (hashes[self._start[r] : self._start[r] + self.size[r]] for r in (one[at], other[at]))
            common[at] = _common(x, y, threshold / (1 + threshold) * (len(x) + len(y)) - 1e-9)
        short = np.flatnonzero(~long)
        chunk = np.cumsum(a[short] + b[short]) // ELEMENTS_AT_ONCE
        for piece in np.split(short, np.flatnonzero(np.diff(chunk)) + 1):
            pair = np.arange(len(piece), dtype=np.uint64) << np.uint64(32)
            keys = np.concatenate(
                [
                    np.repeat(pair, self.size[r]) | hashes[ranges(self._start[r], self.size[r])]
                    for r in (one[piece], other[piece])
                ]
            )
            keys.sort(kind="stable")  # merges the two ascending runs, in a tenth of the time
            twice = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)
            common[piece] = np.bincount(twice.astype(np.int64), minlength=len(piece))
        similarity = common / (a + b - common)
        return np.where(similarity >= threshold - 1e-12, similarity, 0)  # whatever the rounding


def _common(x: np.ndarray, y: np.ndarray, needed: float) -> int:
    """How many elements two ascending arrays share; 0 where a quarter of them shows that it is not enough."""
    a, b = len(x) // 4, int(np.searchsorted(y, x[len(x) // 4]))
    for first, second, rest in ((x[:a], y[:b], min(len(x) - a, len(y) - b)), (x, y, 0)):
        both = np.concatenate([first, second])
        both.sort(kind="stable")  # as above
        common = int(np.count_nonzero(both[1:] == both[:-1]))
        if common + rest < needed:
            return 0
    return common


def _sets_of_batch(texts: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sets of a batch.

    Returns:
        (sizes int64 [n], hashes uint32 [sum of sizes], signatures uint64 [n, 2] that are equal for equal
        sets).
    """
    size, hashes = shingle_sets(texts)
    if not len(size):  # reduceat refuses to add nothing
        return size, hashes, np.zeros((0, 2), np.uint64)
    starts = np.cumsum(size) - size
    signatures = np.stack([np.add.reduceat(mixed(hashes * m), starts) for m in _MIX[:2]], axis=1)
    return size, hashes, signatures


def _first_equal(size: np.ndarray, signatures: np.ndarray) -> np.ndarray:
    """For each row the first row with the same set: the same size and signature."""
    order = np.lexsort((signatures[:, 1], signatures[:, 0]))
    new = np.ones(len(order), bool)
    one, other = order[1:], order[:-1]
    new[1:] = (signatures[one] != signatures[other]).any(axis=1) | (size[one] != size[other])
    starts = np.flatnonzero(new)
    first = np.empty_like(order)
    # The rows of a run are ascending only within equal keys, which lexsort keeps in order.
    first[order] = np.minimum.reduceat(order, starts)[np.cumsum(new) - 1] if len(order) else order
    return first

"""Ids of many texts at once, by array arithmetic: no work per token or per text, only per distinct chunk.

    The cat sat on 12 mats.|The cat ran.
    The| cat| sat| on| 1|2| mats|.|The| cat| ran|.     cuts that are certain (boundaries.py)
    0    1    2    3   4  5 6     7 0   1    8    7     numbers of the distinct chunks
    [..] [..] ...                                       their ids, remembered; put end to end by one gather

Everything but the look-up of the distinct chunks runs outside the interpreter's lock, so batches can be encoded by
several threads.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.boundaries import may_share_a_piece
from sft_pipeline.stages.tokenized_rows.pieces import PieceEncoder

Ints = npt.NDArray[np.int64]

MAX_CHUNKS = 1 << 20  # remembered; some 150 MB if it ever fills up
LONGEST = 64  # characters of a chunk that is remembered: what is longer hardly comes again


@dataclass(frozen=True)
class Chunked:
    """Texts, encoded.

    Attributes:
        ids: int32, of all texts, end to end.
        ends: int64 (texts + 1,): tokens before each text, and in all.
        faithful: bool (texts,): whether the ids stand for exactly the bytes of the text.
    """

    ids: npt.NDArray[np.int32]
    ends: Ints
    faithful: npt.NDArray[np.bool_]


class _Chunks(dict[str, bytes]):
    """Chunk -> its ids as int32 bytes; encoded when first asked for."""

    def __init__(self, pieces: PieceEncoder) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, chunk: str) -> bytes:
        ids = self._pieces.encode(chunk)
        if len(chunk) <= LONGEST and len(self) < MAX_CHUNKS:
            self[chunk] = ids
        return ids


class ChunkEncoder:
    """Encodes arrays of texts with the ids of a `PieceEncoder`."""

    def __init__(self, pieces: PieceEncoder) -> None:
        self._pieces = pieces
        self._chunks = _Chunks(pieces)
        shared = may_share_a_piece(pieces.patterns)
        # Where words are never cut apart for certain, chunks would be as long as the texts and never come again.
        self._cuts = None if shared is None or shared[ord("a"), ord(" ")] else _Cuts(shared)

    def encode(
        self, texts: pa.StringArray, whole: npt.NDArray[np.bool_], known: Mapping[str, bytes]
    ) -> Chunked:
        """The ids of each text.

        Args:
            texts: None of them empty; less than 256 MiB in all.
            whole: Which of them are looked up as they are, not cut: they are in `known`, or plain text that is hardly
                worth cutting. The others are plain (ASCII, no `ODD_CONTROL`) and hold no added token.
            known: Text -> ids as int32 bytes.
        """
        data, at = text_bytes(texts)
        firsts, begins = self._cut(data, at, whole)
        chunks = pa.StringArray.from_buffers(len(begins) - 1, pa.py_buffer(begins), pa.py_buffer(data))
        numbered = chunks.dictionary_encode()
        distinct = numbered.dictionary
        look_up = self._chunks.__getitem__
        found = [known.get(c) or look_up(c) for c in distinct.to_pylist()] if known else list(map(look_up, distinct.to_pylist()))  # fmt: skip
        sizes = np.fromiter(map(len, found), np.int32, len(found))
        blobs = pa.BinaryArray.from_buffers(
            pa.binary(), len(found), [None, pa.py_buffer(_ends(sizes, np.int32)), pa.py_buffer(b"".join(found))]
        )  # fmt: skip
        gathered = blobs.take(numbered.indices)
        _, offsets, ids = gathered.buffers()
        token_ends = np.frombuffer(offsets, np.int32, len(gathered) + 1)[firsts] // 4
        faithful = np.ones(len(texts), dtype=bool)
        strange = self._strange(distinct, blobs)
        if len(strange):
            bad = np.isin(numbered.indices.to_numpy(), strange)
            faithful = np.add.reduceat(bad, firsts[:-1], dtype=np.int64) == 0
        return Chunked(np.frombuffer(ids, np.int32, int(token_ends[-1])), token_ends.astype(np.int64), faithful)  # fmt: skip

    def _cut(self, data: bytes, at: Ints, whole: npt.NDArray[np.bool_]) -> tuple[Ints, npt.NDArray[np.int32]]:
        """The first chunk of each text (and the number of all), and where each chunk begins (and the last ends)."""
        if self._cuts is None:
            return np.arange(len(at)), at.astype(np.int32)
        cut = self._cuts.of(data)
        cut &= np.repeat(~whole, np.diff(at))
        cut[at[:-1]] = True
        begins = np.append(np.flatnonzero(cut), len(data))
        return np.searchsorted(begins, at), begins.astype(np.int32)

    def _strange(self, distinct: pa.StringArray, blobs: pa.BinaryArray) -> Ints:
        """Numbers of the chunks whose ids do not stand for exactly their bytes."""
        _, _, ids = blobs.buffers()
        decoded = self._pieces.text_of(np.frombuffer(ids, np.int32))
        if decoded == text_bytes(distinct)[0]:
            return np.zeros(0, np.int64)
        return np.array([
            i for i, (ids, text) in enumerate(zip(blobs.to_pylist(), distinct.to_pylist(), strict=True))
            if self._pieces.text_of(np.frombuffer(ids, np.int32)) != text.encode()
        ])  # fmt: skip


class _Cuts:
    """Finds the certain cuts, given which two characters may share a piece: bool (128, 128)."""

    def __init__(self, shared: npt.NDArray[np.bool_]) -> None:
        _, kinds = np.unique(np.concatenate([shared, shared.T], axis=1), axis=0, return_inverse=True)
        kinds = kinds.reshape(-1)
        self._count = int(kinds.max()) + 1
        assert self._count <= 16  # a pair of kinds is a byte
        self._kinds = bytes(kinds.tolist()) + bytes(128)  # what is not ASCII is never cut
        between = np.zeros(256, np.uint8)
        for a in range(128):
            between[kinds[a] * self._count + kinds] = ~shared[a]
        self._between = between.tobytes()

    def of(self, data: bytes) -> npt.NDArray[np.bool_]:
        """For each byte whether there is a cut before it."""
        kinds = np.frombuffer(
            data.translate(self._kinds), np.uint8
        )  # much faster than an index into an array
        pairs = kinds[:-1] * np.uint8(self._count)
        pairs += kinds[1:]
        cut = np.empty(len(data), dtype=bool)
        cut[:1] = True
        cut[1:] = np.frombuffer(pairs.tobytes().translate(self._between), bool)
        return cut


def text_bytes(texts: pa.StringArray) -> tuple[bytes, Ints]:
    """The texts' bytes end to end, and int64 where each begins (and the last ends)."""
    _, offsets, data = texts.buffers()
    at = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    begin, end = (int(at[0]), int(at[-1])) if len(at) else (0, 0)
    return (data.slice(begin, end - begin).to_pybytes() if data else b""), at - begin


def _ends(sizes: npt.NDArray, dtype: type) -> npt.NDArray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(dtype)

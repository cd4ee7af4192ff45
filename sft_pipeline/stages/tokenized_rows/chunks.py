"""Ids of many texts at once, by array arithmetic: no work per token or per text, only per distinct chunk.

    The cat sat on 12 mats.|The cat ran.
    The| cat| sat| on| 1|2| mats|.|The| cat| ran|.     cuts that are certain (boundaries.py)
    0    1    2    3   4  5 6     7 0   1    8    7     numbers of the distinct chunks
    [..] [..] ...                                       their ids, remembered; put end to end by one gather

The ids of a chunk are those that the reference tokenizer gives it. Text that is not plain is a chunk of its own.
Everything but the look-up of the distinct chunks runs outside the interpreter's lock, so batches can be encoded by
several threads.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.boundaries import may_share_a_piece
from sft_pipeline.stages.tokenized_rows.byte_level import ByteLevel
from sft_pipeline.text.tokenizer import Tokenizer

Ints = npt.NDArray[np.int64]

MAX_CHUNKS = 1 << 20  # remembered; some 150 MB if it ever fills up
LONGEST = 64  # characters of a chunk that is remembered: what is longer hardly comes again
MAX_SHARED = 4096  # longer texts that are remembered all the same


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


class ChunkEncoder:
    """Encodes arrays of texts. May be used by several threads.

    Attributes:
        byte_level: What is known of the tokenizer.

    Raises:
        Unsupported: It is not of the kind that can be encoded in chunks.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.byte_level = ByteLevel(tokenizer)
        self._encode_batch = tokenizer.backend.encode_batch_fast
        self._known: dict[str, bytes] = {}
        self._shared: dict[str, bytes] = {}
        shared = may_share_a_piece(self.byte_level.patterns)
        # Where words are never cut apart for certain, chunks would be as long as the texts and never come again.
        self._cuts = None if shared is None or shared[ord("a"), ord(" ")] else _Cuts(shared)

    def encode(
        self, texts: pa.StringArray, whole: npt.NDArray[np.bool_], constants: Mapping[str, bytes]
    ) -> Chunked:
        """The ids of each text.

        Args:
            texts: None of them empty; less than 256 MiB in all.
            whole: Which of them are one chunk each. The others are plain (ASCII, no `ODD_CONTROL`). None holds an added
                token, but for constants.
            constants: Text -> ids as int32 bytes, for texts whose ids are known.
        """
        data, at = text_bytes(texts)
        firsts, begins = self._cut(data, at, whole)
        chunks = pa.StringArray.from_buffers(len(begins) - 1, pa.py_buffer(begins), pa.py_buffer(data))
        numbered = chunks.dictionary_encode()
        distinct = numbered.dictionary
        found = self._look_up(distinct.to_pylist(), constants)
        blobs = pa.BinaryArray.from_buffers(
            pa.binary(), len(found), [None, pa.py_buffer(_ends(found)), pa.py_buffer(b"".join(found))]
        )
        gathered = blobs.take(numbered.indices)
        _, offsets, ids = gathered.buffers()
        token_ends = np.frombuffer(offsets, np.int32, len(gathered) + 1)[firsts] // 4
        faithful = np.ones(len(texts), dtype=bool)
        strange = self._strange(distinct, blobs)
        if len(strange):
            bad = np.isin(numbered.indices.to_numpy(), strange)
            faithful = np.add.reduceat(bad, firsts[:-1], dtype=np.int64) == 0
        return Chunked(
            np.frombuffer(ids, np.int32, int(token_ends[-1])), token_ends.astype(np.int64), faithful
        )

    def remember(self, texts: Sequence[str]) -> None:
        """Texts that many rows are likely to share, however long they are."""
        # Other threads add too, so there may be more than the limit already.
        room = max(0, MAX_SHARED - len(self._shared))
        missing = [t for t in texts if t not in self._shared][:room]
        if missing:
            self._shared |= zip(missing, self._ids(missing), strict=True)

    def _look_up(self, chunks: list[str], constants: Mapping[str, bytes]) -> list[bytes]:
        known = self._known.get
        found = [constants.get(c) or known(c) for c in chunks]
        missing = [i for i, ids in enumerate(found) if ids is None]
        if missing and self._shared:
            for i in missing:
                found[i] = self._shared.get(chunks[i])
            missing = [i for i in missing if found[i] is None]
        for i, ids in zip(missing, self._ids([chunks[i] for i in missing]), strict=True):
            found[i] = ids
            if len(chunks[i]) <= LONGEST and len(self._known) < MAX_CHUNKS:
                self._known[chunks[i]] = ids
        return found  # type: ignore[return-value]

    def _ids(self, texts: list[str]) -> list[bytes]:
        return [array("i", e.ids).tobytes() for e in self._encode_batch(texts, add_special_tokens=False)]

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
        decoded = self.byte_level.text_of(np.frombuffer(ids, np.int32))
        if decoded == text_bytes(distinct)[0]:
            return np.zeros(0, np.int64)
        return np.array(
            [
                i
                for i, (ids, text) in enumerate(zip(blobs.to_pylist(), distinct.to_pylist(), strict=True))
                if self.byte_level.text_of(np.frombuffer(ids, np.int32)) != text.encode()
            ]
        )


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


def _ends(values: Sequence[bytes]) -> npt.NDArray[np.int32]:
    """Where each value begins, laid end to end (and the last ends)."""
    ends = np.zeros(len(values) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, values), np.int32, len(values)), out=ends[1:])
    return ends

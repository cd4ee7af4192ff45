"""Blocks on disk: whole examples laid end to end, with what is needed to keep them apart.

    input_ids      a a a a b b b        two examples of four and three tokens in one block
    labels         . . a a . b b        (. is -100)
    position_ids   0 1 2 3 0 1 2
    lengths        4 3
    row_ids        a b

A dataset's tokens are never held as Python objects: they lie in one flat scratch file that is read through the page
cache, and blocks are gathered from it with array indices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.packed_shards.packing import Packing
from sft_pipeline.stages.tables import PartWriter, read_batches

IGNORE = -100
ROW_GROUP = 256
CHUNK_TOKENS = 1 << 22  # gathered at a time

BLOCKS = pa.schema(
    [
        ("block", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("position_ids", pa.list_(pa.int32())),
        ("lengths", pa.list_(pa.int32())),
        ("row_ids", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class FlatRows:
    """All examples of one side, end to end.

    Attributes:
        ids: int32 (tokens,), memory-mapped.
        supervised: bool (tokens,), memory-mapped: whether the position carries loss.
        starts: int64 (examples + 1,).
        row_ids: One per example.
        wrong_labels: Positions whose label is neither -100 nor the input id, or that are supervised at an example's start.
    """

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    row_ids: pa.StringArray
    wrong_labels: int

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.starts)

    @property
    def supervised_counts(self) -> npt.NDArray[np.int64]:
        """Supervised tokens per example."""
        if len(self.starts) == 1:
            return np.empty(0, dtype=np.int64)
        return np.add.reduceat(self.supervised, self.starts[:-1], dtype=np.int64)


def flatten(parts: Sequence[Path], scratch: Path) -> FlatRows:
    """Writes the token columns of tokenized rows end to end.

    Args:
        parts: Parquet files with row_id, input_ids and labels.
        scratch: A folder for two files, which must outlive the result.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    lengths, row_ids, wrong = [np.zeros(1, dtype=np.int64)], [], 0
    with (
        (scratch / "ids.bin").open("wb") as ids_file,
        (scratch / "supervised.bin").open("wb") as supervised_file,
    ):
        for batch in read_batches(parts, ["row_id", "input_ids", "labels"]):
            ids, labels = (batch.column(name).flatten().to_numpy() for name in ("input_ids", "labels"))
            offsets = batch.column("input_ids").offsets.to_numpy()
            supervised = labels != IGNORE
            wrong += int(np.count_nonzero(supervised & (labels != ids))) + int(
                np.count_nonzero(supervised[offsets[:-1] - offsets[0]])
            )
            ids.tofile(ids_file)
            supervised.tofile(supervised_file)
            lengths.append(np.diff(offsets).astype(np.int64))
            row_ids.append(batch.column("row_id"))
    return FlatRows(
        ids=_map(scratch / "ids.bin", np.int32),
        supervised=_map(scratch / "supervised.bin", np.bool_),
        starts=np.cumsum(np.concatenate(lengths)),
        row_ids=pa.chunked_array(row_ids, pa.string()).combine_chunks(),
        wrong_labels=wrong,
    )


def _map(path: Path, dtype: type) -> npt.NDArray:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


@dataclass(frozen=True)
class Written:
    """What was found while blocks were written.

    Attributes:
        blocks, examples, tokens: How many.
        bad_boundaries: Examples whose position ids do not run 0, 1, ..., length - 1.
        supervised: Supervised tokens.
    """

    blocks: int
    examples: int
    tokens: int
    supervised: int
    bad_boundaries: int


def write_blocks(rows: FlatRows, packing: Packing, folder: Path) -> Written:
    """Writes the blocks of one side as Parquet parts, a few million tokens at a time."""
    examples = tokens = supervised = bad = 0
    with PartWriter(folder, BLOCKS, row_group=ROW_GROUP) as out:
        for batch in gather(rows, packing):
            out.write(batch)
            positions = batch.column("position_ids").flatten().to_numpy()
            lengths = batch.column("lengths").flatten().to_numpy()
            ends = np.cumsum(lengths) - 1
            examples += len(lengths)
            tokens += len(positions)
            supervised += int(np.count_nonzero(batch.column("labels").flatten().to_numpy() != IGNORE))
            bad += int(np.count_nonzero(positions[ends] != lengths - 1)) + abs(
                int(np.count_nonzero(positions == 0)) - len(lengths)
            )
        return Written(out.rows, examples, tokens, supervised, bad)


def gather(rows: FlatRows, packing: Packing) -> Iterator[pa.RecordBatch]:
    """The blocks as Arrow batches of the schema `BLOCKS`, in order."""
    per_block = packing.sums(rows.lengths)
    first = 0
    while first < packing.blocks:
        room = np.cumsum(per_block[first : first + ROW_GROUP * 64])
        stop = first + max(int(np.searchsorted(room, CHUNK_TOKENS, side="right")), 1)
        yield _batch(rows, packing, first, stop)
        first = stop


def _batch(rows: FlatRows, packing: Packing, first: int, stop: int) -> pa.RecordBatch:
    members = packing.order[packing.starts[first] : packing.starts[stop]]
    per_block = np.diff(packing.starts[first : stop + 1])
    lengths = rows.lengths[members]
    position = position_ids(lengths)
    source = np.repeat(rows.starts[members], lengths) + position
    ids = rows.ids[source]
    labels = np.where(rows.supervised[source], ids, np.int32(IGNORE))
    segments = _offsets(per_block)
    tokens = _offsets(np.add.reduceat(lengths, segments[:-1]))
    return pa.RecordBatch.from_arrays(
        [
            pa.array(np.arange(first, stop, dtype=np.int32)),
            pa.ListArray.from_arrays(pa.array(tokens), pa.array(ids)),
            pa.ListArray.from_arrays(pa.array(tokens), pa.array(labels)),
            pa.ListArray.from_arrays(pa.array(tokens), pa.array(position.astype(np.int32))),
            pa.ListArray.from_arrays(pa.array(segments), pa.array(lengths.astype(np.int32))),
            pa.ListArray.from_arrays(pa.array(segments), rows.row_ids.take(pa.array(members))),
        ],
        schema=BLOCKS,
    )


def position_ids(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """0 1 2 ... for each example, end to end: lengths 3 3 -> 0 1 2 0 1 2."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(int(np.sum(lengths)), dtype=np.int64) - np.repeat(starts, lengths)


def _offsets(sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)

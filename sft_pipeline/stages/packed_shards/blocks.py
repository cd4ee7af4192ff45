"""Blocks on disk: whole examples laid end to end, with what is needed to keep them apart.

    input_ids      a a a a b b b        two examples of four and three tokens in one block
    labels         . . a a . b b        (. is -100)
    weights        0 0 1 1 0 .5 .5      (null where all that have a label count 1)
    position_ids   0 1 2 3 0 1 2
    seq_lengths    4 3
    row_ids        a b

A dataset's tokens are never held as Python objects: they lie in one flat scratch file that is read through
the page cache, and blocks are gathered from it with array indices. Training reads blocks in random order, a
row group at a time; so row groups are small, and so are parts, whose footers it reads before anything else.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.packed_shards.packing import Packing
from sft_pipeline.tables.loss_weights import summed_weights, weights_column, weights_of
from sft_pipeline.tables.parquet import BackgroundWriter, PartWriter, count_rows, read_batches
from sft_pipeline.tables.schemas import IGNORE_LABEL

GROUP_TOKENS = 1 << 15  # about so many in a row group
GROUP_BLOCKS = 4_096  # at most so many in a row group
GROUPS_PER_PART = 128
CHUNK_TOKENS = 1 << 20  # gathered at a time
RESIDENT_BYTES = 1 << 30  # the pages of a larger scratch file are released after each chunk
_SUPERVISED = np.int32(-(1 << 31))  # the sign bit of a stored token id

BLOCKS = pa.schema(
    [
        ("block", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("position_ids", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
        ("row_ids", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class FlatRows:
    """All examples of one split, end to end.

    Attributes:
        tokens: int32 (tokens,), memory-mapped: input ids, with the sign bit set where a position is
            supervised.
        starts: int64 (examples + 1,).
        supervised: int64 (examples,): supervised tokens.
        weights: float32 (tokens,), memory-mapped: what each supervised token counts for in the loss, 0 for
            1; None where all count 1.
        weight: float64 (examples,): sums of these; where there are none, equal to `supervised`.
        row_ids: One per example.
        wrong_labels: Positions whose label is neither -100 nor the input id, or that are supervised at an
            example's start.
        mapped: The maps that `tokens` and `weights` are views of.
    """

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32] | None
    weight: npt.NDArray[np.float64]
    row_ids: pa.StringArray
    wrong_labels: int
    mapped: tuple[mmap.mmap, ...]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per example."""
        return np.diff(self.starts)

    def release(self) -> None:
        """Takes the pages of large files out of this process's memory; they are mapped again when read."""
        for mapped in self.mapped:
            if len(mapped) > RESIDENT_BYTES:
                mapped.madvise(mmap.MADV_DONTNEED)


def flatten(parts: Sequence[Path], scratch: Path, report: Reporter | None = None) -> FlatRows:
    """Writes the token columns of tokenized rows end to end.

    Args:
        parts: Parquet files with row_id, input_ids, labels and weights.
        scratch: A folder for files, which must outlive the result.
        report: Told how far the reading is.
    """
    report = report or Reporter()
    scratch.mkdir(parents=True, exist_ok=True)
    total, done = count_rows(parts), 0
    lengths, supervised = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    weight = [np.zeros(0, dtype=np.float64)]
    row_ids, wrong, any_weights = [], 0, False
    with (scratch / "tokens.bin").open("wb") as file, (scratch / "weights.bin").open("wb") as weight_file:
        for batch in read_batches(parts, ["row_id", "input_ids", "labels", "weights"]):
            ids, labels = (batch.column(name).flatten().to_numpy() for name in ("input_ids", "labels"))
            offsets = batch.column("input_ids").offsets.to_numpy().astype(np.int64)
            offsets -= offsets[0]
            counts = labels != IGNORE_LABEL
            wrong += int(np.count_nonzero(counts & (labels != ids)))
            wrong += int(np.count_nonzero(counts[offsets[:-1]]))
            weights = weights_of(batch)
            if weights is not None:  # batches that have none leave a hole, which reads as zeros
                any_weights = True
                weight_file.seek(file.tell())  # tokens and weights both take four bytes
                weights.tofile(weight_file)
            np.where(counts, ids | _SUPERVISED, ids).tofile(file)
            lengths.append(np.diff(offsets))
            supervised.append(np.add.reduceat(counts, offsets[:-1], dtype=np.int64))
            weight.append(summed_weights(weights, labels, offsets))
            row_ids.append(batch.column("row_id"))
            done += batch.num_rows
            report.progress("reading tokens", done, total, "rows")
        weight_file.truncate(file.tell() if any_weights else 0)
    token_map, weight_map = (_mapped(scratch / name) for name in ("tokens.bin", "weights.bin"))
    return FlatRows(
        tokens=np.frombuffer(token_map or b"", np.int32),
        starts=np.cumsum(np.concatenate(lengths)),
        supervised=np.concatenate(supervised),
        weights=np.frombuffer(weight_map, np.float32) if weight_map else None,
        weight=np.concatenate(weight),
        row_ids=pa.chunked_array(row_ids, pa.string()).combine_chunks(),
        wrong_labels=wrong,
        mapped=tuple(m for m in (token_map, weight_map) if m),
    )


def _mapped(path: Path) -> mmap.mmap | None:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return None
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True)
class WrittenBlocks:
    """What was found while blocks were written.

    Attributes:
        blocks, examples, tokens: How many.
        bad_boundaries: Examples whose position ids do not run 0, 1, ..., length - 1.
        supervised: Supervised tokens.
        weight: float64 (blocks,): sums of their loss weights.
        wrong_weights: Positions with a loss weight and no label, or the other way round.
    """

    blocks: int
    examples: int
    tokens: int
    supervised: int
    weight: npt.NDArray[np.float64]
    wrong_weights: int
    bad_boundaries: int


def write_blocks(
    rows: FlatRows, packing: Packing, folder: Path, report: Reporter | None = None
) -> WrittenBlocks:
    """Writes the blocks of one split as Parquet parts, about a million tokens at a time."""
    report = report or Reporter()
    examples = tokens = supervised = bad = wrong_weights = 0
    weight = [np.zeros(0, dtype=np.float64)]
    mean = len(rows.tokens) // max(packing.blocks, 1)
    # About GROUP_TOKENS each: training reads a whole row group to get one block.
    group = min(max(GROUP_TOKENS // max(mean, 1), 1), GROUP_BLOCKS)
    with (
        PartWriter(
            folder, BLOCKS, rows_per_part=group * GROUPS_PER_PART, row_group=group, of_tokens=True
        ) as out,
        BackgroundWriter() as background,
    ):
        for batch in gather(rows, packing):
            background.submit(out.write, batch)
            positions = batch.column("position_ids").flatten().to_numpy()
            lengths = batch.column("seq_lengths").flatten().to_numpy()
            ends = np.cumsum(lengths) - 1
            examples += len(lengths)
            tokens += len(positions)
            report.progress("writing blocks", tokens, len(rows.tokens), "tokens")
            labels, weights = batch.column("labels"), weights_of(batch)
            flat = labels.flatten().to_numpy()
            supervised += int(np.count_nonzero(flat != IGNORE_LABEL))
            weight.append(summed_weights(weights, flat, labels.offsets.to_numpy()))
            if weights is not None:
                wrong_weights += int(np.count_nonzero((weights > 0) != (flat != IGNORE_LABEL)))
            bad += int(np.count_nonzero(positions[ends] != lengths - 1)) + abs(
                int(np.count_nonzero(positions == 0)) - len(lengths)
            )
    return WrittenBlocks(out.rows, examples, tokens, supervised, np.concatenate(weight), wrong_weights, bad)


def gather(rows: FlatRows, packing: Packing) -> Iterator[pa.RecordBatch]:
    """The blocks as Arrow batches of the schema `BLOCKS`, in order."""
    ends = np.cumsum(packing.sums(rows.lengths))
    first = done = 0
    while first < packing.blocks:
        stop = max(int(np.searchsorted(ends, done + CHUNK_TOKENS, side="right")), first + 1)
        yield _batch(rows, packing, first, stop)
        rows.release()
        first, done = stop, int(ends[stop - 1])


def _batch(rows: FlatRows, packing: Packing, first: int, stop: int) -> pa.RecordBatch:
    members = packing.order[packing.starts[first] : packing.starts[stop]]
    per_block = np.diff(packing.starts[first : stop + 1])
    begin = rows.starts[members]
    lengths = rows.starts[members + 1] - begin
    position = position_ids(lengths)
    at = np.repeat(begin, lengths) + position
    stored = rows.tokens[at]
    ids = stored & ~_SUPERVISED
    labels = np.where(stored < 0, ids, np.int32(IGNORE_LABEL))
    weights = None
    if rows.weights is not None:
        weights = rows.weights[at]
        weights[(weights == 0) & (stored < 0)] = 1
    segments = _offsets(per_block)
    tokens = _offsets(np.add.reduceat(lengths, segments[:-1]))
    return pa.RecordBatch.from_arrays(
        [
            pa.array(np.arange(first, stop, dtype=np.int32)),
            pa.ListArray.from_arrays(pa.array(tokens), pa.array(ids)),
            pa.ListArray.from_arrays(pa.array(tokens), pa.array(labels)),
            weights_column(weights, labels, tokens),
            pa.ListArray.from_arrays(pa.array(tokens), pa.array(position)),
            pa.ListArray.from_arrays(pa.array(segments), pa.array(lengths.astype(np.int32))),
            pa.ListArray.from_arrays(pa.array(segments), rows.row_ids.take(pa.array(members))),
        ],
        schema=BLOCKS,
    )


def position_ids(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """0 1 2 ... for each example, end to end: lengths 3 3 -> 0 1 2 0 1 2."""
    starts = np.cumsum(lengths, dtype=np.int32) - lengths
    total = int(np.sum(lengths))
    return np.arange(total, dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)


def _offsets(sizes: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)

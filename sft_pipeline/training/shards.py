"""Packed shards as random-access blocks, and the update plan. Nothing is converted or copied at start."""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.errors import InputError

CACHE_BYTES = 512 << 20
PLAN_GROUPS = 8  # row groups of the plan that are kept
REBUILD = "Delete the artifact's folder to have it rebuilt"


@dataclass(frozen=True)
class Block:
    """One packed sequence: whole examples ("segments") one after another.

    input_ids, labels, position_ids: int32 [L]; lengths: int32 [segments], summing to L; labels -100: not
    supervised; weights: float32 [L], what each token counts for in the loss, or None where all count 1.
    """

    block: int
    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    lengths: np.ndarray
    weights: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        """Where each segment begins."""
        return np.cumsum(self.lengths) - self.lengths


class Shards:
    """The blocks of one split, read by number from Parquet parts; row groups are cached up to a bound.

    Blocks lie in the parts in the order of their numbers, so a block is found by bisection: the first one is
    there as soon in a large dataset as in a small one. That the numbers are right is seen in each row group
    when it is read.
    """

    def __init__(
        self, parts: Sequence[Path], *, cache_bytes: int = CACHE_BYTES, most: int | None = None
    ) -> None:
        """Opens the first and the last part.

        Args:
            parts: In order, as `artifact.parts("train")` gives them.
            cache_bytes: Bound on the row groups kept in memory; the last one always is.
            most: Only that many blocks, the first ones.

        Raises:
            InputError: The first or last part cannot be read.
        """
        self._paths = list(parts)
        self._parts: dict[int, ShardPart] = {}
        self._cache: OrderedDict[tuple[int, int], tuple[pa.RecordBatch, int]] = OrderedDict()
        self._cached, self._cache_bytes = 0, cache_bytes
        count = self._first(len(self._paths))
        if count and self._first(0):
            raise _misnumbered(self._paths[0])
        self._count = count if most is None else min(count, most)

    def __len__(self) -> int:
        return self._count

    def block(self, number: int) -> Block:
        """One block, as views of its row group.

        Raises:
            InputError: There is no such block, or its part is damaged.
        """
        batch, row = self._locate(number)
        values = {
            name: _row(batch, name, row) for name in ("input_ids", "labels", "position_ids", "seq_lengths")
        }
        length = int(values["seq_lengths"].sum())
        weighted = batch.column("weights").is_valid()[row].as_py()
        return Block(
            number,
            values["input_ids"][:length],
            values["labels"][:length],
            values["position_ids"][:length],
            values["seq_lengths"],
            _row(batch, "weights", row)[:length] if weighted else None,
        )

    def row_ids(self, number: int) -> list[str]:
        """The rows in a block, in segment order."""
        batch, row = self._locate(number)
        return batch.column("row_ids")[row].as_py()

    def _part(self, index: int) -> "ShardPart":
        if index not in self._parts:
            self._parts[index] = ShardPart(self._paths[index])
        return self._parts[index]

    def _first(self, index: int) -> int:
        """The first block number from a part on; for the part after the last, the number of all blocks."""
        if index < len(self._paths):
            part = self._part(index)
            return part.first if part.rows else self._first(index + 1)
        rows = (self._part(i) for i in reversed(range(len(self._paths))))
        return next((part.first + part.rows for part in rows if part.rows), 0)

    def _locate(self, number: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= number < self._count:
            raise InputError(
                f"block {number} is in the update plan but not among the {self._count} packed blocks"
            )
        index = bisect_right(range(len(self._paths)), number, key=self._first) - 1
        if self._first(index) + self._part(index).rows != self._first(index + 1):
            raise _misnumbered(self._paths[index])
        part = self._part(index)
        group = part.group_of(number)
        key = (index, group)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            batch = part.read(group)
            self._cache[key] = (batch, batch.nbytes)
            self._cached += batch.nbytes
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1][1]
        return self._cache[key][0], number - part.starts[group]


class ShardPart:
    """One Parquet part: consecutive blocks.

    Attributes:
        first: The number of its first block; 0 where it has none.
        rows: How many blocks it holds.
        starts: The number of each row group's first block.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({error}). {REBUILD}") from error
        metadata = self._file.metadata
        self.rows = metadata.num_rows
        self.first = _bounds(metadata, 0, "block", path)[0] if self.rows else 0
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.starts = list(accumulate(sizes, initial=self.first))[:-1]

    def group_of(self, number: int) -> int:
        """The row group that a block is in."""
        return bisect_right(self.starts, number) - 1

    def read(self, group: int) -> pa.RecordBatch:
        """One row group, all columns.

        Raises:
            InputError: Its blocks are not the ones that belong there.
        """
        batch = self._file.read_row_group(group).combine_chunks().to_batches()[0]
        blocks = batch.column("block").to_numpy()
        if not np.array_equal(blocks, np.arange(len(blocks)) + self.starts[group]):
            raise _misnumbered(self._path)
        return batch


def _misnumbered(path: Path) -> InputError:
    return InputError(f"{path}: blocks are not numbered 0, 1, 2, ... over the parts. {REBUILD}")


def _bounds(metadata: pq.FileMetaData, group: int, name: str, path: Path) -> tuple[int, int]:
    """The least and the greatest value of a top-level column in a row group, by the file's footer.

    Raises:
        InputError: The footer does not say.
    """
    column = metadata.row_group(group).column(metadata.schema.names.index(name))
    if column.statistics is None or not column.statistics.has_min_max:
        raise InputError(f"{path}: its footer has no statistics of {name}. {REBUILD}")
    return column.statistics.min, column.statistics.max


def _row(batch: pa.RecordBatch, name: str, row: int) -> np.ndarray:
    """One row of a list column, without a copy."""
    column = batch.column(name)
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.to_numpy(zero_copy_only=False)[start:stop]


class Plan:
    """Which blocks form each update, over all epochs, in order.

    Read from the file a row group at a time, so that the first update is there as soon in a long plan as in a
    short one. The file counts updates from 1, as people do; here they are indices, from 0.
    """

    def __init__(self, path: Path) -> None:
        """Reads the footer alone.

        Raises:
            InputError: The plan cannot be read, is empty, or its updates are not numbered 1, 2, 3, ...
        """
        self._path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: not a readable update plan ({error})") from error
        metadata = self._file.metadata
        groups = range(metadata.num_row_groups if metadata.num_rows else 0)
        bounds = [_bounds(metadata, group, "update", path) for group in groups]
        self._firsts, self._lasts = [first - 1 for first, _ in bounds], [last - 1 for _, last in bounds]
        steps = [first - last for first, last in zip(self._firsts, [-1, *self._lasts])]
        if not bounds or steps[0] != 1 or not {0, 1}.issuperset(steps):
            raise self._unordered()
        self._read: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        """Updates in the plan."""
        return self._lasts[-1] + 1

    def blocks(self, update: int) -> np.ndarray:
        """Block numbers of one update, in the plan's order (int32).

        Raises:
            InputError: The plan is not in the order of training there.
        """
        found = []
        for group in range(bisect_left(self._lasts, update), bisect_right(self._firsts, update)):
            updates, blocks = self._group(group)
            start, stop = np.searchsorted(updates, [update, update + 1])
            found.append(blocks[start:stop])
        return np.concatenate(found)

    def planned(self, name: str, updates: int) -> int | None:
        """What the plan says the first `updates` updates hold: `name` is examples, tokens or supervised.

        None where the plan does not say.
        """
        if name not in self._file.schema_arrow.names:
            return None
        total = 0
        for group in range(bisect_left(self._firsts, updates)):
            table = self._file.read_row_group(group, columns=["update", name])
            total += int(table[name].to_numpy()[table["update"].to_numpy() <= updates].sum())
        return total

    def _group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """(update, block) of each row of a row group, checked to be in order; the last few are kept."""
        if group not in self._read:
            names = ["update", "position", "block"]
            table = self._file.read_row_group(group, columns=names)
            update, position, block = (table[name].to_numpy() for name in names)
            same = np.diff(update) == 0
            expected = np.where(same, position[:-1] + 1, 0)
            if not (
                np.array_equal(update[1:], update[:-1] + ~same) and np.array_equal(position[1:], expected)
            ):
                raise self._unordered()
            self._read[group] = (update - 1, block)
            while len(self._read) > PLAN_GROUPS:
                self._read.popitem(last=False)
        return self._read[group]

    def _unordered(self) -> InputError:
        return InputError(
            f"{self._path}: updates are not numbered 1, 2, 3, ... with their blocks in order. {REBUILD}"
        )

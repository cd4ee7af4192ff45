"""Packed shards as random-access blocks, and the update plan. Nothing is converted or copied at start."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.errors import InputError

CACHE_BYTES = 512 << 20


@dataclass(frozen=True)
class Block:
    """One packed sequence: whole examples ("segments") one after another.

    input_ids, labels, position_ids: int32 [L]; lengths: int32 [segments], summing to L; labels -100: not supervised.
    """

    block: int
    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """Where each segment begins."""
        return np.cumsum(self.lengths) - self.lengths


class Shards:
    """The blocks of one side, read by number from memory-mapped Parquet parts; row groups are cached up to a bound."""

    def __init__(self, parts: Sequence[Path], *, cache_bytes: int = CACHE_BYTES) -> None:
        """
        Raises:
            InputError: A part cannot be read, or block numbers are not 0, 1, 2, ... once each.
        """
        self._files = []
        self._cache: OrderedDict[tuple[int, int], tuple[pa.RecordBatch, int]] = OrderedDict()
        self._cached, self._cache_bytes = 0, cache_bytes
        where: list[np.ndarray] = []  # rows of (block, part, row group, row in it)
        for part, path in enumerate(parts):
            try:
                file = pq.ParquetFile(path, memory_map=True)
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(
                    f"{path}: not a readable Parquet file ({error}). Delete the artifact's folder to have it rebuilt"
                ) from error
            self._files.append(file)
            blocks = file.read(columns=["block"])["block"].to_numpy()
            start = 0
            for group in range(file.num_row_groups):
                n = file.metadata.row_group(group).num_rows
                own = np.stack(
                    [blocks[start : start + n], np.full(n, part), np.full(n, group), np.arange(n)], axis=1
                )
                where.append(own.astype(np.int32))
                start += n
        rows = np.concatenate(where) if where else np.zeros((0, 4), np.int32)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        if not np.array_equal(rows[:, 0], np.arange(len(rows))):
            raise InputError(f"{parts[0].parent}: block numbers are not 0 to {len(rows) - 1} once each")
        self._where = rows[:, 1:]

    def __len__(self) -> int:
        return len(self._where)

    def block(self, number: int) -> Block:
        """
        Raises:
            InputError: There is no such block.
        """
        batch, row = self._locate(number)
        values = {name: _row(batch, name, row) for name in ("input_ids", "labels", "position_ids", "lengths")}
        length = int(values["lengths"].sum())
        return Block(
            number,
            values["input_ids"][:length],
            values["labels"][:length],
            values["position_ids"][:length],
            values["lengths"],
        )

    def row_ids(self, number: int) -> list[str]:
        """The rows in a block, in segment order."""
        batch, row = self._locate(number)
        return batch.column("row_ids")[row].as_py()

    def _locate(self, number: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= number < len(self._where):
            raise InputError(
                f"block {number} is in the update plan but not among the {len(self._where)} packed blocks"
            )
        part, group, row = (int(x) for x in self._where[number])
        key = (part, group)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            table = self._files[part].read_row_group(
                group, columns=["input_ids", "labels", "position_ids", "lengths", "row_ids"]
            )
            batch = table.combine_chunks().to_batches()[0]
            self._cache[key] = (batch, table.nbytes)
            self._cached += table.nbytes
            while self._cached > self._cache_bytes and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1][1]
        return self._cache[key][0], row


def _row(batch: pa.RecordBatch, name: str, row: int) -> np.ndarray:
    """One row of a list<int32> column, without a copy."""
    column = batch.column(name)
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    return column.values.to_numpy(zero_copy_only=False)[start:stop]


class Plan:
    """Which blocks form each update, over all epochs, in order."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: The plan cannot be read, is empty, or its updates are not numbered 0, 1, 2, ...
        """
        try:
            table = pq.read_table(path, memory_map=True)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: not a readable update plan ({error})") from error
        update, position = table["update"].to_numpy(), table["position"].to_numpy()
        order = np.lexsort((position, update))
        self._blocks = table["block"].to_numpy()[order]
        self._counts = {
            name: table[name].to_numpy()[order]
            for name in ("examples", "tokens", "supervised")
            if name in table.column_names
        }
        numbers, starts = np.unique(update[order], return_index=True)
        if not len(numbers) or not np.array_equal(numbers, np.arange(len(numbers))):
            raise InputError(f"{path}: updates are not numbered from 0 without gaps")
        self._starts = np.append(starts, len(order))

    def __len__(self) -> int:
        """Updates in the plan."""
        return len(self._starts) - 1

    def planned(self, name: str, updates: int) -> int | None:
        """What the plan itself says the first `updates` updates hold: `name` is examples, tokens or supervised.

        None where the plan does not say.
        """
        return int(self._counts[name][: self._starts[updates]].sum()) if name in self._counts else None

    def blocks(self, update: int) -> np.ndarray:
        """Block numbers of one update, in the plan's order."""
        return self._blocks[self._starts[update] : self._starts[update + 1]]

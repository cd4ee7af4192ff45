"""Token ids of earlier examples, wanted in any order and read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

HELD_BYTES = 128 << 20
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Group:
    """A row group of a file."""

    path: Path
    index: int


class TokenGroups:
    """The `input_ids` of all examples in some parts of tokenized_rows.

    A row group is read when an example of it is first wanted, and forgotten when all that are wanted have been taken. Two
    snapshots mostly have their rows in the same order, so few are held at a time; if there are many, the oldest wait on
    the disk.

    Args:
        parts: Files in the schema TOKENIZED.
        lengths: Tokens of each example in them.
        times: How often each of them will be taken.
        scratch: A folder for those that wait.
    """

    def __init__(
        self,
        parts: Sequence[Path],
        lengths: npt.NDArray[np.int32],
        times: npt.NDArray[np.int64],
        scratch: Path,
    ) -> None:
        self._groups: list[_Group] = []
        counts = [0]
        for path in parts:
            with pq.ParquetFile(path) as file:
                for i in range(file.num_row_groups):
                    self._groups.append(_Group(path, i))
                    counts.append(file.metadata.row_group(i).num_rows)
        self._first = np.cumsum(counts, dtype=np.int64)  # example of each group
        ends = np.cumsum(lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], ends])
        wanted = np.concatenate([[0], np.cumsum(times, dtype=np.int64)])
        self._left = np.diff(wanted[self._first])  # examples still to be taken, of each group
        self._scratch = scratch
        self._held: dict[int, npt.NDArray[np.int32]] = {}
        self._held_bytes = 0

    @property
    def held(self) -> int:
        """Row groups in the memory."""
        return len(self._held)

    def copy(self, examples: Ints, to: npt.NDArray[np.int32], at: Ints) -> None:
        """Puts the ids of examples where they belong in `to`."""
        group = np.searchsorted(self._first, examples, side="right") - 1
        starts = self._starts[self._first[group]]
        begins, ends = self._starts[examples] - starts, self._starts[examples + 1] - starts
        for g in np.unique(group).tolist():
            here = group == g
            for begin, end, place in _runs(begins[here], ends[here], at[here]):
                to[place : place + end - begin] = self._slice(g, begin, end)
            self._left[g] -= np.count_nonzero(here)
            if not self._left[g]:
                self._forget(g)

    def _slice(self, g: int, begin: int, end: int) -> npt.NDArray[np.int32]:
        if g not in self._held:
            if (waiting := self._waiting(g)).exists():
                return np.fromfile(waiting, np.int32, end - begin, offset=4 * begin)
            self._read(g)
        return self._held[g][begin:end]

    def _read(self, g: int) -> None:
        with pq.ParquetFile(self._groups[g].path) as file:
            table = file.read_row_group(self._groups[g].index, columns=["input_ids"], use_threads=False)
        ids = table.combine_chunks()["input_ids"].chunk(0).flatten().to_numpy()
        while self._held and self._held_bytes + ids.nbytes > HELD_BYTES:
            self._set_aside(next(iter(self._held)))
        self._held[g] = ids
        self._held_bytes += ids.nbytes

    def _set_aside(self, g: int) -> None:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._held[g].tofile(self._waiting(g))
        self._drop(g)

    def _forget(self, g: int) -> None:
        if g in self._held:
            self._drop(g)
        self._waiting(g).unlink(missing_ok=True)

    def _drop(self, g: int) -> None:
        self._held_bytes -= self._held.pop(g).nbytes

    def _waiting(self, g: int) -> Path:
        return self._scratch / f"{g}.bin"


def copy_runs(ids: npt.NDArray[np.int32], starts: Ints, to: npt.NDArray[np.int32], at: Ints) -> None:
    """Puts the ids of examples, which lie end to end, where they belong in `to`.

    Args:
        starts: Where each example begins, and where the last one ends.
    """
    for begin, end, place in _runs(starts[:-1], starts[1:], at):
        to[place : place + end - begin] = ids[begin:end]


def _runs(begins: Ints, ends: Ints, at: Ints) -> Iterator[tuple[int, int, int]]:
    """(begin, end, place) of neighbours that stay neighbours."""
    if not len(at):
        return
    apart = (begins[1:] != ends[:-1]) | (at[1:] != at[:-1] + ends[:-1] - begins[:-1])
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    last = np.append(first[1:], len(at)) - 1
    yield from zip(begins[first].tolist(), ends[last].tolist(), at[first].tolist(), strict=True)

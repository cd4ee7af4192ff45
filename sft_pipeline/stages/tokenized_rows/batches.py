"""The rows of a split in batches: which of them an earlier build has, and who encodes the others.

few new rows    the referee's process, which has all it needs at hand
many            threads with whole columns; a sample goes to the referee too
many, but slow  worker processes, row by row
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.encoding import Done, Encoders
from sft_pipeline.stages.tokenized_rows.referee import SAMPLE, Referee
from sft_pipeline.stages.tokenized_rows.reuse import Earlier
from sft_pipeline.stages.workers import Answer, ordered_map, threaded_map, worker_count
from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import count_rows, read_batches
from sft_pipeline.tables.schemas import SPLITS

BATCH = 4_096
COMPARED = 2_000  # rows encoded both ways; where there are not twice as many, all rows go the slow way
FEW_OF_MANY = 20_000  # new rows that the referee's process encodes where the others are known
WORTH_WORKERS = 8_000  # rows to encode the slow way; a worker first loads the tokenizer
AHEAD = 4  # batches that the referee may have to encode at a time
_COLUMNS = ("row_id", "source", "file", "line", "group", "messages", "tools", "content_key")


@dataclass(frozen=True)
class Batch:
    """A batch of one side.

    Attributes:
        found: The row of the earlier builds that is the same (-1: none).
        sampled: Which of the rows that have none the referee looks at.
    """

    side: str
    rows: pa.RecordBatch
    found: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.bool_]

    @cached_property
    def new(self) -> pa.RecordBatch:
        """Its rows that are to be encoded."""
        is_new = self.found < 0
        return self.rows if is_new.all() else self.rows.filter(pa.array(is_new))


class Batches:
    """All rows of a split.

    Args:
        sides: Side -> its files.
        builds: Earlier builds to take rows from.
        scratch: A folder for what is taken from them, for as long as this is used.
        fast: Whether the fast way may be used.

    Attributes:
        total, new: Rows in all, and those that no earlier build has.
        earlier: What the others were made into.
    """

    def __init__(
        self, sides: dict[str, list[Path]], builds: Sequence[Artifact], scratch: Path, *, fast: bool
    ) -> None:
        self._sides, self._fast = sides, fast
        self.total = count_rows(path for paths in sides.values() for path in paths)
        self._anew = not builds
        self.earlier = Earlier(
            builds, [rows.column(0) for _, rows in self._read(["content_key"])] if builds else [], scratch
        )
        self.new = self.total - int(np.count_nonzero(self.earlier.found >= 0))

    @property
    def by_the_referee(self) -> bool:
        """Whether so few rows are new that they are done before other threads and processes have begun."""
        return self.new <= (2 * COMPARED if self._anew else FEW_OF_MANY)

    @property
    def by_rows(self) -> bool:
        """Whether all go row by row: the fast way is ruled out, or comparing would cost more than it gains."""
        return not self._fast or (self.by_the_referee and self._anew)

    @property
    def compares(self) -> bool:
        """Whether the referee's own result is another than the one that is written."""
        return not (self.by_rows and self.by_the_referee)

    def __iter__(self) -> Iterator[Batch]:
        done = seen = 0
        threshold = "" if self.by_rows else self._threshold
        # A sample of all rows was compared when they were new. Of few new ones it may hold none: so the first are in it.
        first = 0 if self._anew and not self.by_rows else SAMPLE
        for side, rows in self._read(list(_COLUMNS)):
            here = slice(done, done + rows.num_rows)
            found = np.full(rows.num_rows, -1) if self._anew else self.earlier.found[here]
            ids = rows.column("row_id").filter(pa.array(found < 0))
            chosen = pc.less_equal(ids, threshold).to_numpy(zero_copy_only=False)
            yield Batch(side, rows, found, chosen | (seen + np.arange(len(ids)) < first))
            done, seen = here.stop, seen + len(ids)

    def _read(self, columns: list[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        for side in SPLITS:
            for rows in read_batches(self._sides[side], columns, batch_rows=BATCH):
                yield side, rows

    @property
    def _threshold(self) -> str:
        """The row ids up to this one are compared: they are hashes, so the smallest of them are a fair sample."""
        ids = pa.chunked_array([rows.column(0) for _, rows in self._read(["row_id"])], pa.string())
        if len(ids) <= COMPARED:
            return "\U0010ffff"
        smallest = pc.select_k_unstable(pa.table({"row_id": ids}), COMPARED, [("row_id", "ascending")])
        return pc.max(ids.take(smallest)).as_py()


def encoded(
    batches: Batches, encoders: Encoders, referee: Referee
) -> Generator[tuple[Batch, Done], None, None]:
    """Every batch, in order, with what became of those of its rows that no earlier build has."""
    return _by_the_referee(batches, referee) if batches.by_the_referee else _here(batches, encoders, referee)


def _by_the_referee(batches: Batches, referee: Referee) -> Generator[tuple[Batch, Done], None, None]:
    flying: deque[tuple[Batch, Answer]] = deque()
    for batch in batches:
        flying.append((batch, referee.encode(batch.new, batch.sampled, by_rows=batches.by_rows)))
        while flying and (len(flying) == AHEAD or flying[0][1].is_here):
            batch, done = flying.popleft()
            yield batch, done.get()
    for batch, done in flying:
        yield batch, done.get()


def _here(
    batches: Batches, encoders: Encoders, referee: Referee
) -> Generator[tuple[Batch, Done], None, None]:
    waiting: deque[Batch] = deque()

    def new_rows() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            waiting.append(batch)
            referee.look_at(batch.new.filter(pa.array(batch.sampled)))
            yield batch.new

    todo = new_rows()
    for rows in islice(todo, 1):
        first = encoders(rows)
        yield waiting.popleft(), first
        slow = 4 * int(np.count_nonzero(~first.by_columns)) > len(first.by_columns)
        if slow and batches.new > WORTH_WORKERS:
            results = (
                done
                for _, done in ordered_map(
                    Encoders, encoders.arguments, todo, here=encoders, inline=lambda *_: False
                )
            )
        else:
            results = threaded_map(encoders, todo, 1 if slow else worker_count())
        with closing(results):
            for done in results:
                yield waiting.popleft(), done

"""Rows that an earlier build has tokenized already, found by their content.

A row's `content_key` is a hash of its messages and tools, whatever file, line, name or group it has. Only
builds with the same code, tokenizer, template and mask are searched (see `Build.earlier`), so an equal key
means equal examples.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sft_pipeline.stages.tokenized_rows.batch_encoder import EncodedBatch
from sft_pipeline.stages.tokenized_rows.column_encoder import completions_of, one_batch
from sft_pipeline.stages.tokenized_rows.outcomes import OUTCOMES, OUTCOMES_FILE, mask_of, span_weights_of
from sft_pipeline.stages.tokenized_rows.word_cache import Ints, running_totals
from sft_pipeline.store import Artifact
from sft_pipeline.tables.loss_weights import weights_column
from sft_pipeline.tables.schemas import IGNORE_LABEL, KEY_BYTES, SPLITS, TOKENIZED

HELD_BYTES = 128 << 20  # of token ids of earlier builds in memory; more of them wait on the disk
_CARRIED = ("length", "supervised", "prompt_length", "truncated")


class RowCache:
    """What earlier builds made of the rows that are wanted now.

    Args:
        artifacts: tokenized_rows of the same code, tokenizer, template and mask; a row is taken from the
            first that has it.
        wanted: Content keys of the rows of this build, in order.
        scratch: A folder for tokens that do not fit into memory, for as long as this is used.

    Attributes:
        found: int64 (rows,), for each wanted row the same row of the earlier builds (-1: none).
        used: The artifacts that rows are taken from.
    """

    def __init__(self, artifacts: Sequence[Artifact], wanted: Sequence[pa.Array], scratch: Path) -> None:
        these = _numbers(wanted)
        missing = these[:, 0]
        self.used: list[Artifact] = []
        outcomes, first = [OUTCOMES.empty_table()], [np.zeros(0, np.int64)]
        carried, parts = [TOKENIZED.empty_table().select(_CARRIED)], list[Path]()
        for artifact in artifacts:
            if not len(missing):
                break
            theirs = _read(artifact.file(OUTCOMES_FILE))
            keys = _numbers(theirs["key"].chunks)[:, 0]
            has = np.isin(keys, missing)
            if not has.any():
                continue
            self.used.append(artifact)
            missing = missing[~np.isin(missing, keys)]
            outcomes.append(theirs.filter(pa.array(has)))
            first.append(sum(map(len, carried)) + running_totals(theirs["examples"].to_numpy())[:-1][has])
            here = [part for split in SPLITS for part in artifact.parts(split)]
            carried += [_read(part, _CARRIED) for part in here]
            parts += here
        self._outcomes = pa.concat_tables(outcomes).combine_chunks()
        self._first = np.concatenate(first)  # example of each row
        examples = pa.concat_tables(carried)
        self._carried = {name: examples[name].to_numpy() for name in _CARRIED}
        self.found = _find(these, _numbers(self._outcomes["key"].chunks))
        each = self._outcomes["examples"].to_numpy()
        times = np.bincount(self.found + 1, minlength=len(each) + 1)[1:]  # that a row is wanted
        examples_wanted = np.zeros(len(examples), np.int64)
        examples_wanted[_ranges(self._first, each)] = np.repeat(times, each)
        self._tokens = TokenGroups(parts, self._carried["length"], examples_wanted, scratch)

    def merge(self, found: Ints, rows: pa.RecordBatch, new: EncodedBatch) -> EncodedBatch:
        """The results of all rows of a batch, under the row ids and groups that they have now.

        Args:
            found: As in the attribute, for the rows of the batch.
            new: The results of those that were not found.
        """
        known = found >= 0
        if not known.any():
            return new
        # Outcomes of all rows; `row` and `part` say whose each example is, `old` which examples are reused.
        outcomes = _in_order(known, self._outcomes.take(pa.array(found[known])), new.outcomes)
        each = outcomes.column("examples").to_numpy()
        first = running_totals(each)
        row = np.repeat(np.arange(len(found)), each)  # of each example
        part = np.arange(len(row)) - first[row]
        old = known[row]
        # The reused examples' numbers in the earlier builds, and the columns that are carried over.
        given = _ranges(self._first[found[known]], each[known])
        carried = {
            n: _filled(old, self._carried[n][given], new.examples.column(n).to_numpy()) for n in _CARRIED
        }
        # The ids, reused and new, each at its example's place.
        begins = running_totals(carried["length"])
        ids = np.empty(begins[-1], np.int32)
        self._tokens.copy(given, ids, begins[:-1][old])
        new_ids = new.examples.column("input_ids").flatten().to_numpy()
        starts = running_totals(carried["length"][~old])
        for begin, end, place in _runs(starts[:-1], starts[1:], begins[:-1][~old]):
            ids[place : place + end - begin] = new_ids[begin:end]
        # Labels follow from the ids and the supervised spans; names and groups are those of these rows.
        spans = outcomes.column("spans")
        supervised = mask_of(spans, begins[first])
        weights = span_weights_of(spans, outcomes.column("span_weights"), begins[first])
        labels = np.where(supervised, ids, np.int32(IGNORE_LABEL))
        lists = pa.array(begins.astype(np.int32))
        columns = {
            "row_id": _named(rows.column("row_id").take(pa.array(row)), part),
            "group": rows.column("group").take(pa.array(row)),
            "input_ids": pa.ListArray.from_arrays(lists, pa.array(ids)),
            "labels": pa.ListArray.from_arrays(lists, pa.array(labels)),
            "weights": weights_column(weights, labels, begins),
            "completion": completions_of(rows).take(pa.array(row)),
            **{name: pa.array(values) for name, values in carried.items()},
        }
        examples = pa.RecordBatch.from_arrays([columns[name] for name in TOKENIZED.names], schema=TOKENIZED)
        return EncodedBatch(outcomes, examples)


class TokenGroups:
    """The `input_ids` of all examples in some parts of tokenized_rows.

    A row group is read when an example of it is first wanted, and dropped when all that are wanted have been
    taken. Two snapshots mostly have their rows in the same order, so few are held at a time; if there are
    many, the oldest are spilled to the disk uncompressed, from where single examples can be read.

    Args:
        parts: Files in the schema TOKENIZED.
        lengths: Tokens of each example in them.
        times: How often each of them will be taken.
        scratch: A folder for those that are spilled.
    """

    def __init__(
        self,
        parts: Sequence[Path],
        lengths: npt.NDArray[np.int32],
        times: npt.NDArray[np.int64],
        scratch: Path,
    ) -> None:
        self._groups: list[tuple[Path, int]] = []
        counts = [0]
        for path in parts:
            with pq.ParquetFile(path) as file:
                for i in range(file.num_row_groups):
                    self._groups.append((path, i))
                    counts.append(file.metadata.row_group(i).num_rows)
        self._first = np.cumsum(counts, dtype=np.int64)  # example of each group
        ends = np.cumsum(lengths, dtype=np.int64)
        self._starts = np.concatenate([[0], ends])
        wanted = np.concatenate([[0], np.cumsum(times, dtype=np.int64)])
        self._left = np.diff(wanted[self._first])  # examples still to be taken, of each group
        self._scratch = scratch
        self._held: dict[int, npt.NDArray[np.int32]] = {}
        self._held_bytes = 0
        self._thread = ThreadPoolExecutor(1)  # reads the next group while one is copied from
        self._ahead: dict[int, Future[npt.NDArray[np.int32]]] = {}

    @property
    def held(self) -> int:
        """How many row groups are in memory."""
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
                self._held_bytes -= self._held.pop(g).nbytes if g in self._held else 0
                self._spilled(g).unlink(missing_ok=True)

    def _slice(self, g: int, begin: int, end: int) -> npt.NDArray[np.int32]:
        if g not in self._held:
            if (spilled := self._spilled(g)).exists():
                return np.fromfile(spilled, np.int32, end - begin, offset=4 * begin)
            self._read(g)
        return self._held[g][begin:end]

    def _read(self, g: int) -> None:
        reading = self._ahead.pop(g, None) or self._thread.submit(_read_ids, *self._groups[g])
        following = g + 1
        wanted = following < len(self._groups) and self._left[following] and following not in self._held
        if wanted and not self._spilled(following).exists():
            self._ahead = {following: self._thread.submit(_read_ids, *self._groups[following])}
        ids = reading.result()
        while self._held and self._held_bytes + ids.nbytes > HELD_BYTES:
            oldest = next(iter(self._held))
            self._scratch.mkdir(parents=True, exist_ok=True)
            self._held[oldest].tofile(self._spilled(oldest))
            self._held_bytes -= self._held.pop(oldest).nbytes
        self._held[g] = ids
        self._held_bytes += ids.nbytes

    def _spilled(self, g: int) -> Path:
        return self._scratch / f"{g}.bin"


def _read_ids(path: Path, row_group: int) -> npt.NDArray[np.int32]:
    with pq.ParquetFile(path) as file:
        table = file.read_row_group(row_group, columns=["input_ids"], use_threads=False)
    return table.combine_chunks()["input_ids"].chunk(0).flatten().to_numpy()


def _runs(begins: Ints, ends: Ints, at: Ints) -> Iterator[tuple[int, int, int]]:
    """(begin, end, place) of each run of neighbours that stay neighbours, so that copies are few."""
    if not len(at):
        return
    apart = (begins[1:] != ends[:-1]) | (at[1:] != at[:-1] + ends[:-1] - begins[:-1])
    first = np.concatenate([[0], np.flatnonzero(apart) + 1])
    last = np.append(first[1:], len(at)) - 1
    yield from zip(begins[first].tolist(), ends[last].tolist(), at[first].tolist(), strict=True)


def _read(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(columns=list(columns) if columns else None)


def _ranges(first: Ints, counts: npt.NDArray) -> Ints:
    """first, first + 1, ... of each range, end to end."""
    before = running_totals(counts)
    return np.repeat(first - before[:-1], counts) + np.arange(before[-1])


def _numbers(keys: Sequence[pa.Array]) -> npt.NDArray[np.uint64]:
    """Keys as uint64 (rows, 2)."""
    found = [np.zeros((0, 2), np.uint64)]
    for array in keys:
        start, count = array.offset * KEY_BYTES, 2 * len(array)
        found.append(np.frombuffer(array.buffers()[1], np.uint64, count, start).reshape(-1, 2))
    return np.concatenate(found)


def _find(wanted: npt.NDArray[np.uint64], known: npt.NDArray[np.uint64]) -> Ints:
    """For each wanted key the index where it is first known, else -1."""
    if not len(known):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(known[:, 0], kind="stable")
    known = known[order]
    at = np.minimum(np.searchsorted(known[:, 0], wanted[:, 0]), len(known) - 1)
    return np.where((known[at] == wanted).all(axis=1), order[at], -1)


def _named(row_ids: pa.Array, part: Ints) -> pa.Array:
    """Further parts of a split row have "/1", "/2", ... appended."""
    if not part.any():
        return row_ids
    suffix = pa.array([f"/{p}" if p else "" for p in part.tolist()], pa.string())
    return pc.binary_join_element_wise(row_ids, suffix, "")


def _filled(chosen: npt.NDArray[np.bool_], here: npt.NDArray, elsewhere: npt.NDArray) -> npt.NDArray:
    """`here` in the places that are chosen, `elsewhere` in the others."""
    values = np.empty(len(chosen), here.dtype)
    values[chosen], values[~chosen] = here, elsewhere
    return values


def _in_order(chosen: npt.NDArray[np.bool_], here: pa.Table, elsewhere: pa.RecordBatch) -> pa.RecordBatch:
    """The same with rows of outcomes."""
    at = np.arange(len(chosen))
    order = _filled(chosen, at[: len(here)], at[len(here) :])
    both = pa.concat_tables([here, pa.Table.from_batches([elsewhere], here.schema)])
    return one_batch(both.take(pa.array(order)))

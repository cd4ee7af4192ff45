"""Rows that an earlier build has tokenized already, found by their content.

A row's key is a hash of its messages and tools, whatever file, line, name or group it has. Only builds with the same
code, tokenizer, template and mask are asked (see `Build.earlier`), so an equal key means equal examples.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tables import read_batches
from sft_pipeline.stages.tokenized_rows.encode import IGNORE
from sft_pipeline.stages.tokenized_rows.outcomes import OUTCOMES
from sft_pipeline.stages.tokenized_rows.rows import SIDES, TOKENIZED
from sft_pipeline.store import Artifact

KEY_BYTES = 16
OUTCOMES_FILE = "outcomes.parquet"
_ROLES = pa.array(["system", "user", "assistant", "tool"])
_CARRIED = ("length", "supervised", "prompt_length", "truncated")
_CARRIED_SCHEMA = pa.schema([TOKENIZED.field(n) for n in _CARRIED])


def content_keys(batch: pa.RecordBatch) -> pa.Array:
    """The key of each row of a batch of grouped_split: pa.binary(16)."""
    messages = batch.column("messages")
    flat = messages.flatten()
    bounds = messages.offsets.to_numpy().astype(np.int64)
    bounds -= bounds[0] if len(bounds) else 0
    weight = flat.field("weight").cast(pa.float32())
    shape = np.stack(  # what the texts leave open: where one ends, who says it, what is absent
        [
            pc.fill_null(pc.index_in(flat.field("role"), value_set=_ROLES), -1).to_numpy(zero_copy_only=False).astype(np.int32),
            _sizes(flat.field("content")),
            _sizes(flat.field("tool_calls")),
            weight.is_valid().to_numpy(zero_copy_only=False).astype(np.int32),
            pc.fill_null(weight, 0.0).to_numpy(zero_copy_only=False).view(np.int32),
        ],
        axis=1,
    )  # fmt: skip
    parts = [
        _of_rows(np.ascontiguousarray(shape), bounds * shape.shape[1] * shape.itemsize),
        _of_rows(*_bytes(flat.field("content"), bounds)),
        _of_rows(*_bytes(flat.field("tool_calls"), bounds)),
        _of_rows(_sizes(batch.column("tools")), np.arange(batch.num_rows + 1) * shape.itemsize),
        pc.fill_null(batch.column("tools"), "").cast(pa.binary()).cast(pa.large_binary()),
    ]
    rows = pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary()))
    _, offsets, data = rows.buffers()
    view, at = memoryview(data or b""), np.frombuffer(offsets, np.int64)[: len(rows) + 1].tolist()
    blake2b = hashlib.blake2b
    keys = b"".join([blake2b(view[a:b], digest_size=KEY_BYTES).digest() for a, b in pairwise(at)])
    return pa.Array.from_buffers(pa.binary(KEY_BYTES), batch.num_rows, [None, pa.py_buffer(keys)])


def _of_rows(data: Any, at: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """Bytes that lie end to end, as one value per row, given where each begins (and the last ends)."""
    offsets = np.ascontiguousarray(at, dtype=np.int64)
    return pa.Array.from_buffers(pa.large_binary(), len(at) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])  # fmt: skip


def _bytes(texts: pa.StringArray, bounds: npt.NDArray[np.int64]) -> tuple[pa.Buffer, npt.NDArray[np.int64]]:
    """The bytes of texts end to end, and where the first text of each row begins (and the last row ends)."""
    texts = pc.fill_null(texts, "")
    _, offsets, data = texts.buffers()
    at = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1] if len(texts) else np.zeros(1, np.int32)  # fmt: skip
    return data or pa.py_buffer(b""), at[bounds].astype(np.int64)


def _sizes(texts: pa.StringArray) -> npt.NDArray[np.int32]:
    """Bytes of each text; -1 where there is none."""
    return pc.fill_null(pc.binary_length(texts), -1).to_numpy(zero_copy_only=False).astype(np.int32)


def key_numbers(keys: pa.Array) -> npt.NDArray[np.uint64]:
    """Keys as uint64 (rows, 2)."""
    start = keys.offset * KEY_BYTES
    return np.frombuffer(keys.buffers()[1], np.uint64, offset=start, count=2 * len(keys)).reshape(-1, 2)


class Earlier:
    """What earlier builds made of the rows that are wanted now.

    Their tokens lie in scratch files and are read where they are needed.

    Args:
        artifacts: tokenized_rows of the same code, tokenizer, template and mask; the first that has a row gives it.
        wanted: Keys of the rows of this build.
        scratch: A folder for two files of the size of the tokens, for as long as this is used.
    """

    def __init__(self, artifacts: Sequence[Artifact], wanted: Sequence[pa.Array], scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._ids = (scratch / "ids.bin").open("w+b")
        self._supervised = (scratch / "supervised.bin").open("w+b")
        missing = np.concatenate([np.zeros(0, np.uint64), *(key_numbers(k)[:, 0] for k in wanted)])
        outcomes = [pa.RecordBatch.from_pylist([], schema=OUTCOMES)]
        carried = [pa.RecordBatch.from_pylist([], schema=_CARRIED_SCHEMA)]
        for artifact in artifacts:
            if not len(missing):
                break
            theirs = _batch(pa.Table.from_batches(read_batches([artifact.file(OUTCOMES_FILE)]), OUTCOMES))
            first = key_numbers(theirs.column("key"))[:, 0]
            has = np.isin(first, missing)
            missing = missing[~np.isin(missing, first)]
            outcomes.append(theirs.filter(pa.array(has)))
            carried += self._spool(artifact, np.repeat(has, theirs.column("examples").to_numpy()))
        self._outcomes = pa.Table.from_batches(outcomes, OUTCOMES).combine_chunks()
        self._carried = pa.Table.from_batches(carried, _CARRIED_SCHEMA).combine_chunks()
        self._starts = np.concatenate([[0], np.cumsum(self._carried["length"].to_numpy(), dtype=np.int64)])
        self._examples = np.concatenate(
            [[0], np.cumsum(self._outcomes["examples"].to_numpy(), dtype=np.int64)]
        )
        keys = (
            key_numbers(_whole(self._outcomes["key"])) if len(self._outcomes) else np.zeros((0, 2), np.uint64)
        )
        self._order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[self._order]

    def _spool(self, artifact: Artifact, take: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        """Writes the tokens of the examples in `take` to scratch, and gives their other columns."""
        if not take.any():
            return
        done = 0
        parts = [p for side in SIDES for p in artifact.parts(side)]
        for whole in read_batches(parts, ["labels", "input_ids", *_CARRIED]):
            here = take[done : done + whole.num_rows]
            done += whole.num_rows
            batch = whole if here.all() else whole.filter(pa.array(here))
            ids, labels = (batch.column(n).flatten().to_numpy() for n in ("input_ids", "labels"))
            ids.tofile(self._ids)
            (labels == ids).tofile(self._supervised)
            yield batch.select(_CARRIED)

    def __len__(self) -> int:
        return len(self._outcomes)

    def find(self, keys: pa.Array) -> npt.NDArray[np.int64]:
        """For each key the row that has it, -1 where none does."""
        if not len(self):
            return np.full(len(keys), -1, np.int64)
        wanted = key_numbers(keys)
        at = np.minimum(np.searchsorted(self._keys[:, 0], wanted[:, 0]), len(self._keys) - 1)
        return np.where((self._keys[at] == wanted).all(axis=1), self._order[at], -1)

    def give(self, found: npt.NDArray[np.int64], rows: pa.RecordBatch) -> "Given":
        """Outcomes and examples of rows that `find` found, under the names and groups they have now."""
        outcomes = self._outcomes.take(pa.array(found))
        each = np.diff(self._examples)[found]
        row = np.repeat(np.arange(len(found)), each)
        part = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
        examples = self._examples[found][row] + part
        carried = self._carried.take(pa.array(examples))
        ids, supervised = self._tokens(examples)
        offsets = np.concatenate([[0], np.cumsum(carried["length"].to_numpy(), dtype=np.int64)]).astype(
            np.int32
        )
        columns = {
            "row_id": _named(rows.column("row_id").take(pa.array(row)), part),
            "group": rows.column("group").take(pa.array(row)),
            "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
            "labels": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.where(supervised, ids, np.int32(IGNORE)))),
            "completion": _completions(rows).take(pa.array(row)),
            **{name: _whole(carried[name]) for name in _CARRIED},
        }  # fmt: skip
        return Given(
            _batch(outcomes), pa.RecordBatch.from_arrays([columns[f.name] for f in TOKENIZED], schema=TOKENIZED)
        )  # fmt: skip

    def _tokens(self, examples: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and mask of examples, end to end; neighbours are read at once."""
        begins, ends = self._starts[examples], self._starts[examples + 1]
        first = np.flatnonzero(np.concatenate([begins[:1] >= 0, begins[1:] != ends[:-1]]))
        last = [*(first[1:] - 1), len(examples) - 1]
        ids, supervised = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
        for a, b in zip(first, last, strict=False):
            start, count = int(begins[a]), int(ends[b] - begins[a])
            self._ids.seek(4 * start)
            self._supervised.seek(start)
            ids.append(np.fromfile(self._ids, np.int32, count))
            supervised.append(np.fromfile(self._supervised, bool, count))
        return np.concatenate(ids), np.concatenate(supervised)


@dataclass(frozen=True)
class Given:
    """Rows that need not be tokenized: their outcomes, and their examples in the same order."""

    outcomes: pa.RecordBatch
    examples: pa.RecordBatch


def _named(row_ids: pa.Array, part: npt.NDArray[np.int64]) -> pa.Array:
    """Further parts of a split row have "/1", "/2", ... appended."""
    if not part.any():
        return row_ids
    suffix = pa.array([f"/{p}" if p else "" for p in part.tolist()], pa.string())
    return pc.binary_join_element_wise(row_ids, suffix, "")


def _completions(rows: pa.RecordBatch) -> pa.Array:
    """The final assistant message of each row."""
    messages = rows.column("messages")
    last = np.maximum(messages.offsets.to_numpy()[1:] - 1 - messages.offsets[0].as_py(), 0)
    return pc.fill_null(messages.flatten().field("content").take(pa.array(last)), "")


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)

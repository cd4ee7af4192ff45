"""The columns of tokenized rows, and examples as Arrow batches."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.encode import Example
from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED


def to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Examples as one Arrow batch of the schema `TOKENIZED`."""
    lengths = np.array([len(e.input_ids) for e in examples], dtype=np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = [
        pa.array([e.row_id for e in examples], pa.string()),
        pa.array([e.group for e in examples], pa.string()),
        pa.ListArray.from_arrays(offsets, pa.array(_flat(e.input_ids for e in examples))),
        pa.ListArray.from_arrays(offsets, pa.array(_flat(e.labels for e in examples))),
        pa.array(lengths),
        pa.array(np.array([np.count_nonzero(e.labels != IGNORE_LABEL) for e in examples], dtype=np.int32)),
        pa.array(np.array([e.prompt_length for e in examples], dtype=np.int32)),
        pa.array(np.array([e.truncated for e in examples], dtype=np.int32)),
        pa.array([e.completion for e in examples], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=TOKENIZED)


def _flat(arrays: Iterable[np.ndarray]) -> np.ndarray:
    found = list(arrays)
    return np.concatenate(found) if found else np.empty(0, dtype=np.int32)

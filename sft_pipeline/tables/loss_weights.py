"""The column `weights` of tokenized and packed rows: what each token counts for in the loss.

Hardly any data set has such weights, so the column is null wherever every token with a label counts 1.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED


def weights_of(rows: pa.RecordBatch) -> npt.NDArray[np.float32] | None:
    """What each token of some rows counts for in the loss: float32 (tokens,), 0 without a label.

    Args:
        rows: With the columns `labels` and `weights`.

    Returns:
        None where every token with a label counts 1.
    """
    column, labels = rows.column("weights"), rows.column("labels")
    if column.null_count == len(column):
        return None
    weights = (labels.flatten().to_numpy() != IGNORE_LABEL).astype(np.float32)
    own = np.repeat(column.is_valid().to_numpy(zero_copy_only=False), np.diff(labels.offsets.to_numpy()))
    weights[own] = column.drop_null().flatten().to_numpy()
    return weights


def weights_column(
    weights: npt.NDArray[np.float32] | None, labels: npt.NDArray[np.int32], starts: npt.NDArray[np.integer]
) -> pa.ListArray:
    """The column `weights` of sequences laid end to end; null for those whose labels all count 1.

    Args:
        weights: float32 (tokens,), or None where that is so for all.
        labels: int32 (tokens,).
        starts: The first token of each sequence, and the number of all.
    """
    if weights is None:
        return pa.nulls(len(starts) - 1, TOKENIZED.field("weights").type)
    unequal = np.concatenate([[0], np.cumsum((labels != IGNORE_LABEL) & (weights != 1))])
    plain = np.diff(unequal[starts]) == 0
    offsets = pa.array(starts.astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(weights), mask=pa.array(plain))


def summed_weights(
    weights: npt.NDArray[np.float32] | None, labels: npt.NDArray[np.int32], starts: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """The sum of each sequence's weights: float64 (sequences,); arguments as above."""
    counts = (labels != IGNORE_LABEL) if weights is None else weights
    return np.add.reduceat(counts, starts[:-1], dtype=np.float64)

"""What became of each row that was read: one line each in outcomes.parquet.

With the key of a row's content it is also the index by which a later build finds rows to reuse.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.row_encoder import AcceptedRow, RejectedRow
from sft_pipeline.tables.loss_weights import weights_of
from sft_pipeline.tables.schemas import IGNORE_LABEL, KEY_BYTES

OUTCOMES_FILE = "outcomes.parquet"

OUTCOMES = pa.schema(
    [
        ("key", pa.binary(KEY_BYTES)),  # content_key of the row
        ("examples", pa.int32()),  # 0: rejected
        ("reason", pa.string()),  # why it was rejected
        ("detail", pa.string()),
        ("inserted_before", pa.string()),  # what the template wrote into the final turn around the completion
        ("inserted_after", pa.string()),
        ("marks_agree", pa.bool_()),  # with the template's own generation marks; null where it has none
        ("turns_not_supervised", pa.int32()),  # earlier assistant turns that are context only
        ("neutralised", pa.bool_()),  # literal control tokens were made plain text
        # begin, end, begin, ... of what is supervised, the examples of the row laid end to end
        ("spans", pa.list_(pa.int32())),
        ("span_weights", pa.list_(pa.float32())),  # of their tokens; null: each span weighs 1
    ]
)


class RowOutcome(NamedTuple):
    """A line of outcomes.parquet without what differs from row to row: key, spans and their weights."""

    examples: int
    reason: str | None = None
    detail: str | None = None
    inserted_before: str | None = None
    inserted_after: str | None = None
    marks_agree: bool | None = None
    turns_not_supervised: int = 0
    neutralised: bool = False


def outcome_of(result: AcceptedRow | RejectedRow) -> RowOutcome:
    """What became of a row."""
    if isinstance(result, RejectedRow):
        return RowOutcome(0, str(result.reason), result.detail)
    before, after = result.inserted
    return RowOutcome(
        examples=len(result.examples),
        inserted_before=before,
        inserted_after=after,
        marks_agree=result.marks_agree,
        turns_not_supervised=result.turns_not_supervised,
        neutralised=result.neutralised,
    )


def to_outcomes(
    keys: pa.Array, outcomes: Sequence[RowOutcome], which: npt.NDArray[np.int64], examples: pa.RecordBatch
) -> pa.RecordBatch:
    """One line per row.

    Args:
        keys: binary(16) (rows,), the content keys.
        outcomes: The distinct outcomes; most rows share one.
        which: int64 (rows,), which of them each row has.
        examples: All examples of the rows, in their order.
    """
    columns = list(zip(*outcomes, strict=True)) or [()] * len(RowOutcome._fields)
    each = [
        pa.array(c, OUTCOMES.field(n).type).take(pa.array(which))
        for n, c in zip(RowOutcome._fields, columns, strict=True)
    ]
    ends = np.cumsum(np.concatenate([[0], each[0].to_numpy()]))  # the first column is `examples`
    return pa.RecordBatch.from_arrays([keys, *each, *_spans(examples, ends)], schema=OUTCOMES)


def _spans(examples: pa.RecordBatch, ends: npt.NDArray[np.int64]) -> tuple[pa.ListArray, pa.ListArray]:
    """The supervised spans of each row and their weights, given how many examples there are before it (and in
    all).
    """
    starts = np.concatenate([[0], np.cumsum(examples.column("length").to_numpy(), dtype=np.int64)])[ends]
    on = examples.column("labels").flatten().to_numpy() != IGNORE_LABEL
    same = on[1:] & on[:-1]  # whether a token's span goes on in the next token
    weights = weights_of(examples)
    if weights is not None:
        same &= weights[1:] == weights[:-1]
    same = np.concatenate([[False], same, [False]])
    same[starts] = False
    begins = np.flatnonzero(on & ~same[:-1])
    stops = np.flatnonzero(on & ~same[1:]) + 1
    row = np.searchsorted(starts, begins, side="right") - 1
    edges = np.stack([begins, stops], axis=1) - starts[row][:, None]
    spans = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(starts) - 1))])
    lists = pa.ListArray.from_arrays(
        pa.array((2 * spans).astype(np.int32)), pa.array(edges.reshape(-1).astype(np.int32))
    )
    if weights is None:
        return lists, pa.nulls(len(lists), OUTCOMES.field("span_weights").type)
    plain = np.diff(np.concatenate([[0], np.cumsum(weights[begins] != 1)])[spans]) == 0
    return lists, pa.ListArray.from_arrays(
        pa.array(spans.astype(np.int32)), pa.array(weights[begins]), mask=pa.array(plain)
    )


def mask_of(spans: pa.ListArray, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which tokens are supervised: bool (tokens,).

    Args:
        spans: As in `OUTCOMES`.
        starts: The first token of each row, and the number of all.
    """
    return _filled_spans(spans, starts, np.ones(len(spans.flatten()) // 2, dtype=bool))


def span_weights_of(
    spans: pa.ListArray, weights: pa.ListArray, starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32] | None:
    """What the tokens count for: float32 (tokens,), 0 without a label; None where all labels count 1.

    Args:
        spans, weights: As in `OUTCOMES`.
        starts: The first token of each row, and the number of all.
    """
    if weights.null_count == len(weights):
        return None
    of_spans = np.ones(len(spans.flatten()) // 2, dtype=np.float32)
    own = np.repeat(weights.is_valid().to_numpy(zero_copy_only=False), np.diff(spans.offsets.to_numpy()) // 2)
    of_spans[own] = weights.drop_null().flatten().to_numpy()
    return _filled_spans(spans, starts, of_spans)


def _filled_spans(spans: pa.ListArray, starts: npt.NDArray[np.int64], values: npt.NDArray) -> npt.NDArray:
    """For each token the value of its span, 0 outside."""
    each = np.diff(spans.offsets.to_numpy())
    edges = np.concatenate([[0], spans.flatten().to_numpy() + np.repeat(starts[:-1], each), starts[-1:]])
    of_stretches = np.zeros(len(edges) - 1, dtype=values.dtype)  # between edges, every second one is a span
    of_stretches[1::2] = values
    return np.repeat(of_stretches, np.diff(edges))

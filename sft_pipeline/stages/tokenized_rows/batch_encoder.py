"""Batches of grouped_split as examples: by the fast encoder where that is certain, else by the reference.

The fast one (`ColumnEncoder`) takes whole columns, the reference (`RowEncoder`) one row at a time. A sample
of the rows that the fast one has encoded goes to the reference as well, and the two are compared.
"""

import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.column_encoder import ColumnEncoder, EncodedColumns, one_batch
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.outcomes import outcome_of, to_outcomes
from sft_pipeline.stages.tokenized_rows.row_encoder import AcceptedRow, RejectedRow, RowEncoder, to_batch
from sft_pipeline.stages.tokenized_rows.word_cache import NoFastPath
from sft_pipeline.tables.schemas import REJECTS, TOKENIZED
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.reasons import Reason
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer


class FastPathDiffers(Exception):
    """The fast encoder gave another result than the reference; the message is the row's id."""


@dataclass(frozen=True)
class Batch:
    """A batch of one split.

    Attributes:
        found: int64 (rows,), for each row the same row of an earlier build (-1: none).
        new: The rows that have none.
        compared: bool (new rows,), which of them the reference encodes too, where the fast encoder does.
    """

    split: str
    rows: pa.RecordBatch
    found: npt.NDArray[np.int64]
    new: pa.RecordBatch
    compared: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedBatch:
    """The results of a batch of grouped_split, in the order of its rows.

    Attributes:
        outcomes: One line per row, in the schema OUTCOMES.
        examples: Those of the accepted rows, in the schema TOKENIZED.
        numbers: Rows by_columns (the fast encoder), by_rows (the reference) and compared.
        why_not: Why the fast encoder can encode no row, where that is so.
    """

    outcomes: pa.RecordBatch
    examples: pa.RecordBatch
    numbers: Counter[str] = field(default_factory=Counter)
    why_not: str | None = None


class BatchEncoder:
    """Encodes batches of grouped_split. May be used by several threads.

    Args:
        fast: Whether the fast encoder may be used at all.

    Attributes:
        template, row_encoder: Made when they are first needed.
    """

    def __init__(self, config: TokenizedRowsConfig, tokenizer: Tokenizer, fast: bool) -> None:
        self.config, self.tokenizer, self.fast = config, tokenizer, fast
        self._column_encoder: ColumnEncoder | None = None
        self._why_not: str | None = None
        self._lock = threading.Lock()

    @cached_property
    def template(self) -> ChatTemplate:
        config = self.config.template
        return load_template(config.chat_template, self.tokenizer, config.variables)

    @cached_property
    def row_encoder(self) -> RowEncoder:
        config = self.config.template
        return RowEncoder(self.tokenizer, self.template, self.config.tokens, config.system, config.ignore)

    def encode(self, batch: Batch) -> EncodedBatch:
        """Encodes the new rows of a batch.

        Raises:
            FastPathDiffers: The reference gave another result for one of those that are compared.
        """
        rows, compared = batch.new, batch.compared
        columns = self._encode_fast(rows)
        by_row = np.ones(rows.num_rows, dtype=bool)
        if columns is not None:
            by_row[columns.rows] = False
            self._compare(rows, columns, compared[columns.rows])
        indices = np.flatnonzero(by_row)
        results = self.row_encoder.encode(rows.take(pa.array(indices)).to_pylist()) if len(indices) else []
        outcomes, examples = _merge(rows, columns, indices, results)
        numbers = Counter(
            by_columns=rows.num_rows - len(indices),
            by_rows=len(indices),
            compared=0 if columns is None else int(np.count_nonzero(compared[columns.rows])),
        )
        return EncodedBatch(outcomes, examples, numbers, self._why_not)

    def _encode_fast(self, rows: pa.RecordBatch) -> EncodedColumns | None:
        with self._lock:
            if self.fast and self._column_encoder is None and self._why_not is None:
                config = self.config
                try:
                    self._column_encoder = ColumnEncoder(
                        self.tokenizer, self.template, config.tokens, config.template.system
                    )
                except NoFastPath as why:
                    self._why_not = str(why)
        return self._column_encoder.encode(rows) if self._column_encoder else None

    def _compare(
        self, rows: pa.RecordBatch, columns: EncodedColumns, compared: npt.NDArray[np.bool_]
    ) -> None:
        """Encodes the chosen rows by the reference too; raises FastPathDiffers at a difference."""
        chosen = np.flatnonzero(compared)
        given = rows.take(pa.array(columns.rows[chosen])).to_pylist()
        results = self.row_encoder.encode(given)
        outcomes = [columns.layouts[i].outcome for i in columns.layout[chosen]]
        theirs = [outcome_of(r) for r in results]
        ours = columns.examples.take(pa.array(chosen))
        accepted = [r.examples for r in results if isinstance(r, AcceptedRow)]
        if theirs == outcomes and to_batch([e for each in accepted for e in each]).equals(ours):
            return
        for at, (row, result) in enumerate(zip(given, results, strict=True)):  # which one is it?
            examples = result.examples if isinstance(result, AcceptedRow) else ()
            if theirs[at] != outcomes[at] or not to_batch(examples).equals(ours.slice(at, 1)):
                raise FastPathDiffers(row["row_id"])


def _merge(
    rows: pa.RecordBatch,
    columns: EncodedColumns | None,
    indices: npt.NDArray[np.int64],
    results: list[AcceptedRow | RejectedRow],
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Outcomes and examples of all rows in their order; `results` are of the rows at `indices`."""
    found = [r.examples if isinstance(r, AcceptedRow) else () for r in results]
    examples = to_batch([example for each in found for example in each])
    outcomes = [outcome_of(r) for r in results]
    which = np.empty(rows.num_rows, dtype=np.int64)
    if columns is None:
        which[indices] = np.arange(len(indices))
    else:
        outcomes = [layout.outcome for layout in columns.layouts] + outcomes
        which[indices] = len(columns.layouts) + np.arange(len(indices))
        which[columns.rows] = columns.layout
        if examples.num_rows:
            owners = np.concatenate([columns.rows, np.repeat(indices, list(map(len, found)))])
            both = pa.Table.from_batches([columns.examples, examples], TOKENIZED)
            examples = one_batch(both.take(pa.array(np.argsort(owners, kind="stable"))))
        else:
            examples = columns.examples
    return to_outcomes(rows.column("content_key"), outcomes, which, examples), examples


def reject_rows(rows: pa.RecordBatch, outcomes: pa.RecordBatch) -> pa.RecordBatch:
    """The rejected rows of a batch, as rejects.parquet has them."""
    rejected = pa.array(outcomes.column("examples").to_numpy() == 0)
    reasons, details = (outcomes.column(n).filter(rejected).to_pylist() for n in ("reason", "detail"))
    lines = []
    for row, reason, detail in zip(rows.filter(rejected).to_pylist(), reasons, details, strict=True):
        if reason == Reason.FIELD_NOT_RENDERED:  # the field's name belongs to the reason
            reason = f"{reason}: {detail}"
        content = {"messages": row["messages"], "tools": row["tools"]}
        raw = json.dumps(content, ensure_ascii=False, sort_keys=True)
        origin = {name: row[name] for name in ("row_id", "source", "file", "line")}
        lines.append({**origin, "reasons": [reason], "raw": raw, "details": [detail or ""]})
    return pa.RecordBatch.from_pylist(lines, schema=REJECTS)

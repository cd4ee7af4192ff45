"""Both ways of encoding, in one process: whole columns where that works, row by row where it must be."""

import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.byte_level import Unsupported
from sft_pipeline.stages.tokenized_rows.columns import ColumnEncoder, Encoded
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.encode import Accepted, Example, Refused, RowEncoder
from sft_pipeline.stages.tokenized_rows.outcomes import outcome_of, to_outcomes
from sft_pipeline.stages.tokenized_rows.rows import to_batch
from sft_pipeline.stages.tokenized_rows.tracing import Untraceable
from sft_pipeline.tables.schemas import REJECTS, ROWS, TOKENIZED
from sft_pipeline.text.template import ChatTemplate, load_template
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Done:
    """What became of rows of grouped_split; all in their order.

    Attributes:
        outcomes: One line per row.
        examples: Of the accepted ones.
        by_columns: bool (rows,): which of them were encoded as whole columns.
        numbers: by_columns and by_rows (rows), by_reference (texts).
        why_not: Why the fast way cannot be used.
    """

    outcomes: pa.RecordBatch
    examples: pa.RecordBatch
    by_columns: npt.NDArray[np.bool_]
    numbers: Counter[str] = field(default_factory=Counter)
    why_not: str | None = None


class Encoders:
    """Encodes tasks. May be used by several threads.

    Args:
        columns: Whether the fast way may be used at all.

    Attributes:
        tokenizer, template: Loaded when they are first needed.
    """

    def __init__(self, config: TokenizedRowsConfig, columns: bool) -> None:
        self._config, self.columns = config, columns
        self._by_column: ColumnEncoder | None = None
        self._why_not: str | None = None
        self._lock = threading.Lock()

    @property
    def arguments(self) -> tuple[TokenizedRowsConfig, bool]:
        return self._config, self.columns

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._config.tokenizer, self._config.revision)

    @cached_property
    def template(self) -> ChatTemplate:
        return load_template(self._config.template.chat_template, self.tokenizer)

    @cached_property
    def by_row(self) -> RowEncoder:
        config = self._config
        return RowEncoder(self.tokenizer, self.template, config.tokens, config.template.system)

    def fast(self) -> ColumnEncoder | None:
        """The fast way, where it may be used and can be."""
        with self._lock:
            if self.columns and self._by_column is None and self._why_not is None:
                config = self._config
                try:
                    self._by_column = ColumnEncoder(
                        self.tokenizer, self.template, config.tokens, config.template.system
                    )
                except (Unsupported, Untraceable) as why:
                    self._why_not = str(why)
            return self._by_column

    def rehearse(self) -> None:
        """Loads and compiles what most rows will need."""
        said = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
        rows = pa.RecordBatch.from_pylist([{"row_id": "", "group": "", "messages": said}], ROWS)
        self.encode(rows, self.fast())
        self.encode(rows, None)

    def __call__(self, rows: pa.RecordBatch) -> Done:
        """Encodes rows of grouped_split."""
        return self.encode(rows, self.fast())[0]

    def encode(
        self, rows: pa.RecordBatch, fast: ColumnEncoder | None
    ) -> tuple[Done, list[dict[str, Any]], list[Accepted | Refused]]:
        """Encodes rows of grouped_split; also gives those that went row by row, and what became of each."""
        quick = fast.encode(rows) if fast else None
        by_columns = np.zeros(rows.num_rows, dtype=bool)
        if quick is not None:
            by_columns[quick.rows] = True
        by_row = np.flatnonzero(~by_columns)
        slow = rows.take(pa.array(by_row)).to_pylist() if len(by_row) else []
        results = self.by_row.encode(slow) if slow else []
        outcomes, examples = _merged(rows, quick, by_row, results)
        numbers = Counter(
            by_columns=int(np.count_nonzero(by_columns)),
            by_rows=len(by_row),
            by_reference=quick.by_reference if quick else 0,
        )
        return Done(outcomes, examples, by_columns, numbers, self._why_not), slow, results


def _merged(
    rows: pa.RecordBatch,
    quick: Encoded | None,
    by_row: npt.NDArray[np.int64],
    results: Sequence[Accepted | Refused],
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Outcomes and examples of all rows in their order."""
    kinds = [] if quick is None else [skeleton.outcome for skeleton in quick.kinds]
    outcomes = [*kinds, *map(outcome_of, results)]
    which = np.empty(rows.num_rows, dtype=np.int64)
    which[by_row] = len(kinds) + np.arange(len(by_row))
    if quick is not None:
        which[quick.rows] = quick.kind
    found = [r.examples if isinstance(r, Accepted) else () for r in results]
    slow: list[Example] = [example for examples in found for example in examples]
    if quick is None or not slow:
        examples = to_batch(slow) if quick is None else quick.examples
        return to_outcomes(rows.column("content_key"), outcomes, which, examples), examples
    owners = np.repeat(by_row, [len(examples) for examples in found])
    order = np.argsort(np.concatenate([quick.rows, owners]), kind="stable")
    both = pa.Table.from_batches([quick.examples, to_batch(slow)], TOKENIZED).take(pa.array(order))
    examples = both.combine_chunks().to_batches()[0]
    return to_outcomes(rows.column("content_key"), outcomes, which, examples), examples


def reject_rows(rows: pa.RecordBatch, outcomes: pa.RecordBatch) -> pa.RecordBatch:
    """The rejected rows of a batch, as rejects.parquet has them."""
    rejected = pa.array(outcomes.column("examples").to_numpy() == 0)
    reasons = outcomes.column("reason").filter(rejected).to_pylist()
    found: list[dict[str, Any]] = []
    for row, reason in zip(rows.filter(rejected).to_pylist(), reasons, strict=True):
        raw = json.dumps(
            {"messages": row["messages"], "tools": row["tools"]}, ensure_ascii=False, sort_keys=True
        )
        found.append(
            {**{k: row[k] for k in ("row_id", "source", "file", "line")}, "reasons": [reason], "raw": raw}
        )
    return pa.RecordBatch.from_pylist(found, schema=REJECTS)

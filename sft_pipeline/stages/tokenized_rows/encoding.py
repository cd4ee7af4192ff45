"""Both ways of encoding, side by side in one process: whole columns where that works, row by row where it must be.

The fast way is believed only as far as it is compared: rows marked for it are encoded both ways, and whatever differs
is reported, upon which the build starts over without it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.tables import REJECTS
from sft_pipeline.stages.tokenized_rows.columns import ColumnEncoder, Encoded
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.conversation import Conversation, conversation
from sft_pipeline.stages.tokenized_rows.encode import Accepted, Example, Refused, RowEncoder
from sft_pipeline.stages.tokenized_rows.outcomes import Outcome, outcome_of, to_outcomes
from sft_pipeline.stages.tokenized_rows.pieces import Unsupported
from sft_pipeline.stages.tokenized_rows.rows import TOKENIZED, to_batch
from sft_pipeline.stages.tokenized_rows.template import ChatTemplate, load_template
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer, load_tokenizer
from sft_pipeline.stages.tokenized_rows.tracing import Untraceable


@dataclass(frozen=True)
class Task:
    """Rows to encode.

    Attributes:
        rows: A batch of grouped_split.
        keys: Of their contents.
        compare: bool (rows,): which of them are encoded both ways.
    """

    rows: pa.RecordBatch
    keys: pa.Array
    compare: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Done:
    """What became of a task's rows; all in their order.

    Attributes:
        outcomes: One line per row.
        examples: Of the accepted ones.
        numbers: by_columns and by_rows (rows), by_reference (texts), compared (rows).
        differing: Ids of compared rows that came out differently.
        sample: Compared conversations with their first example.
        why_not: Why the fast way cannot be used.
    """

    outcomes: pa.RecordBatch
    examples: pa.RecordBatch
    numbers: Counter[str] = field(default_factory=Counter)
    differing: list[str] = field(default_factory=list)
    sample: list[tuple[Conversation, Example]] = field(default_factory=list)
    why_not: str | None = None


class Encoders:
    """Encodes tasks.

    Args:
        columns: Whether the fast way may be used at all.

    Attributes:
        tokenizer, template: Loaded when they are first needed.
    """

    def __init__(self, config: TokenizedRowsConfig, columns: bool) -> None:
        self.arguments = (config, columns)
        self._config, self._columns = config, columns
        self._by_column: ColumnEncoder | None = None
        self._why_not: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._config.tokenizer, self._config.revision)

    @cached_property
    def template(self) -> ChatTemplate:
        return load_template(self._config.template.chat_template, self.tokenizer)

    @cached_property
    def _by_row(self) -> RowEncoder:
        config = self._config
        return RowEncoder(self.tokenizer, self.template, config.tokens, config.template.system)

    def _fast(self) -> ColumnEncoder | None:
        if self._columns and self._by_column is None and self._why_not is None:
            config = self._config
            try:
                self._by_column = ColumnEncoder(
                    self.tokenizer, self.template, config.tokens, config.template.system
                )
            except (Unsupported, Untraceable) as why:
                self._why_not = str(why)
        return self._by_column

    def __call__(self, task: Task) -> Done:
        """Encodes the rows of one task."""
        fast = None if task.compare.all() else self._fast()
        quick = fast.encode(task.rows) if fast else None
        by_column = np.zeros(task.rows.num_rows, dtype=bool)
        if quick is not None:
            by_column[quick.rows] = True
        by_row = np.flatnonzero(~by_column | task.compare)
        given = task.rows.take(pa.array(by_row)).to_pylist()
        results = self._by_row.encode(given)
        sample = [
            (self._by_row.guard.check(conversation(row, self._by_row.system)), result.examples[0])
            for row, at, result in zip(given, by_row, results, strict=True)
            if task.compare[at] and isinstance(result, Accepted) and not result.examples[0].truncated
        ]
        differing = _differences(quick, task.compare, dict(zip(by_row.tolist(), results, strict=True)))
        outcomes, examples = _merged(task, quick, by_row, results)
        numbers = Counter(
            by_columns=int(np.count_nonzero(by_column & ~task.compare)), by_rows=len(by_row),
            by_reference=quick.by_reference if quick else 0, compared=int(np.count_nonzero(by_column & task.compare)),
        )  # fmt: skip
        return Done(outcomes, examples, numbers, differing, sample, self._why_not)


def _differences(
    quick: Encoded | None, compare: npt.NDArray[np.bool_], exact: dict[int, Accepted | Refused]
) -> list[str]:
    """Ids of the rows that were encoded both ways and came out differently."""
    if quick is None:
        return []
    at = np.flatnonzero(compare[quick.rows])
    results = [exact[row] for row in quick.rows[at].tolist()]
    one_each = [r for r in results if isinstance(r, Accepted) and len(r.examples) == 1]
    outcomes = [quick.kinds[k].outcome for k in quick.kind[at].tolist()]
    fast = quick.examples.take(pa.array(at))
    if outcomes == [outcome_of(r) for r in results] and to_batch([r.examples[0] for r in one_each]).equals(fast):  # fmt: skip
        return []
    return [
        row_id
        for i, (result, row_id) in enumerate(zip(results, fast.column("row_id").to_pylist(), strict=True))
        if outcome_of(result) != outcomes[i]
        or not isinstance(result, Accepted)
        or not to_batch(result.examples).equals(fast.slice(i, 1))
    ]


def _merged(
    task: Task, quick: Encoded | None, by_row: npt.NDArray[np.int64], results: Sequence[Accepted | Refused]
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Outcomes and examples of all rows in their order. Of rows encoded both ways, those of whole columns: they are equal."""
    outcomes: list[Outcome | None] = [None] * task.rows.num_rows
    if quick is not None:
        for row, kind in zip(quick.rows.tolist(), quick.kind.tolist(), strict=True):
            outcomes[row] = quick.kinds[kind].outcome
    slow: list[Example] = []
    owners: list[int] = []
    for row, result in zip(by_row.tolist(), results, strict=True):
        if outcomes[row] is None:
            outcomes[row] = outcome_of(result)
            found = result.examples if isinstance(result, Accepted) else ()
            slow += found
            owners += [row] * len(found)
    written = to_outcomes(task.keys, outcomes)
    if quick is None or not slow:
        return written, to_batch(slow) if quick is None else quick.examples
    order = np.argsort(np.concatenate([quick.rows, np.array(owners, np.int64)]), kind="stable")
    both = pa.Table.from_batches([quick.examples, to_batch(slow)], TOKENIZED).take(pa.array(order))
    return written, both.combine_chunks().to_batches()[0]


def reject_rows(rows: pa.RecordBatch, outcomes: pa.RecordBatch) -> pa.RecordBatch:
    """The rejected rows of a batch, as rejects.parquet has them."""
    rejected = pa.array(outcomes.column("examples").to_numpy() == 0)
    reasons = outcomes.column("reason").filter(rejected).to_pylist()
    found: list[dict[str, Any]] = []
    for row, reason in zip(rows.filter(rejected).to_pylist(), reasons, strict=True):
        raw = json.dumps({"messages": row["messages"], "tools": row["tools"]}, ensure_ascii=False, sort_keys=True)  # fmt: skip
        found.append({**{k: row[k] for k in ("row_id", "source", "file", "line")}, "reasons": [reason], "raw": raw})  # fmt: skip
    return pa.RecordBatch.from_pylist(found, schema=REJECTS)

"""What the checks and the report need to know of the rows, gathered while they pass."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.encoding import Done
from sft_pipeline.stages.tokenized_rows.outcomes import Tally
from sft_pipeline.stages.tokenized_rows.reuse import Given
from sft_pipeline.tables.schemas import IGNORE_LABEL

PREVIEWS = 2
EXAMPLES_PER_REASON = 3


@dataclass
class Seen:
    """What is noted of all batches.

    Attributes:
        tally: Sums over all rows.
        lengths: Tokens per example, one array per batch.
        supervised: Supervised tokens per example, one array per batch.
        read: Rows read per side.
        written: Examples written per side.
        refused: The first rejected rows, for people.
        broken: Written examples that break a promise, per promise. Stays empty.
        previews: The first examples, of one batch.
        numbers: How rows were encoded: reused, tokenized, by_columns, by_rows, by_reference, compared.
        why_not: Why the fast way was not used.
    """

    tally: Tally = field(default_factory=Tally)
    lengths: list[np.ndarray] = field(default_factory=list)
    supervised: list[np.ndarray] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, Any]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    previews: list[dict[str, Any]] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)
    why_not: str | None = None

    def note(self, side: str, read: int, done: Done, whole: Given, refused: pa.RecordBatch) -> None:
        """Takes note of a batch.

        Args:
            read: Its rows.
            done: What was encoded of it.
            whole: All its outcomes and examples.
            refused: Its rows in rejects.parquet.
        """
        reused = read - done.outcomes.num_rows
        self.numbers.update(done.numbers, reused=reused, tokenized=read - reused)
        self.tally.add(whole.outcomes, whole.examples)
        self.read[side] += read
        self.written[side] += whole.examples.num_rows
        self.why_not = done.why_not
        self.previews = self.previews or whole.examples.slice(0, PREVIEWS).to_pylist()
        self._inspect(whole.examples)
        if refused.num_rows:
            self._show(refused, whole.outcomes)

    def _show(self, refused: pa.RecordBatch, outcomes: pa.RecordBatch) -> None:
        shown = Counter(row["reason"] for row in self.refused)
        details = outcomes.column("detail").filter(pc.is_valid(outcomes.column("reason"))).to_pylist()
        for row, detail in zip(refused.to_pylist(), details, strict=True):
            (reason,) = row["reasons"]
            shown[reason] += 1
            if shown[reason] <= EXAMPLES_PER_REASON:
                place = {k: row[k] for k in ("row_id", "file", "line")}
                self.refused.append({**place, "reason": reason, "detail": detail[:200]})

    def _inspect(self, batch: pa.RecordBatch) -> None:
        """Looks at what is about to be written, as arrays: it must hold what the checks promise."""
        if not batch.num_rows:
            return
        ids, labels = (batch.column(name).flatten().to_numpy() for name in ("input_ids", "labels"))
        starts = batch.column("labels").offsets.to_numpy()[:-1]
        starts = starts - starts[0]
        supervised = labels != IGNORE_LABEL
        counted = batch.column("supervised").to_numpy()
        self.broken["nothing supervised"] += int(np.count_nonzero(counted == 0))
        self.broken["position 0 supervised"] += int(np.count_nonzero(supervised[starts]))
        self.broken["label is not the input id"] += int(np.count_nonzero(supervised & (labels != ids)))
        self.broken["supervised count is wrong"] += int(
            np.count_nonzero(np.add.reduceat(supervised, starts, dtype=np.int64) != counted)
        )
        self.lengths.append(batch.column("length").to_numpy())
        self.supervised.append(counted)

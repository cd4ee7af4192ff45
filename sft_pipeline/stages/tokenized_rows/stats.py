"""What the checks and the report need to know of all rows, gathered batch by batch."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.tokenized_rows.batch_encoder import EncodedBatch
from sft_pipeline.store import Artifact
from sft_pipeline.tables.loss_weights import weights_of
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.reasons import Reason

PREVIEWS = 2
EXAMPLES_PER_REASON = 3


@dataclass
class StageStats:
    """Sums over all rows, and the first rows of a kind.

    Attributes:
        numbers: Rows read, accepted, rejected, truncated, split, neutralised; examples, those with loss
            weights (weighted), tokens, supervised_tokens; turns_not_supervised; marks_agree, marks_disagree
            (rows); rows tokenized, reused, by_columns (the fast encoder), by_rows (the reference), compared.
        reasons: Rejected rows by reason.
        inserted: (before, after) the completion, as the template writes it -> rows.
        read, written: Rows read and examples written, by split.
        lengths, supervised: Tokens and supervised tokens per example, one int32 array per batch.
        broken: Written examples that fail an invariant, counted per invariant; all zero in a correct build.
        first_rejected: The first rejected rows of each reason, for people.
        previews: The first examples, for people.
        not_rendered: Rows rejected for a field that the template leaves out, by field.
        reused_from: The artifacts that rows were taken from.
        why_not_fast: Why the fast encoder encoded no row, where that is so.
    """

    numbers: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    inserted: Counter[tuple[str, str]] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    lengths: list[np.ndarray] = field(default_factory=list)
    supervised: list[np.ndarray] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    first_rejected: list[dict[str, Any]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)
    why_not_fast: str | None = None
    not_rendered: Counter[str] = field(default_factory=Counter)
    reused_from: list[Artifact] = field(default_factory=list)

    def add(self, split: str, encoded: EncodedBatch, whole: EncodedBatch, rejects: pa.RecordBatch) -> None:
        """Counts a batch.

        Args:
            encoded: The rows of it that were encoded now.
            whole: All of its rows, those reused from an earlier build included.
            rejects: Its rows in rejects.parquet.
        """
        read, tokenized = whole.outcomes.num_rows, encoded.outcomes.num_rows
        self.numbers.update(encoded.numbers, tokenized=tokenized, reused=read - tokenized)
        self.why_not_fast = encoded.why_not
        self.read[split] += read
        self.written[split] += whole.examples.num_rows
        self._count(whole.outcomes, whole.examples)
        self._inspect(whole.examples)
        self.previews = self.previews or whole.examples.slice(0, PREVIEWS).to_pylist()
        if rejects.num_rows:
            self._note_rejected(rejects, whole.outcomes)

    def _count(self, outcomes: pa.RecordBatch, examples: pa.RecordBatch) -> None:
        each = outcomes.column("examples").to_numpy()
        last = np.cumsum(each) - 1  # of each row's examples
        cut = examples.column("truncated").to_numpy() > 0
        marks = outcomes.column("marks_agree")
        self.numbers.update(
            rows=len(each),
            accepted=int(np.count_nonzero(each)),
            rejected=int(np.count_nonzero(each == 0)),
            examples=int(each.sum()),
            weighted=len(examples) - examples.column("weights").null_count,
            split=int(np.count_nonzero(each > 1)),
            truncated=int(np.count_nonzero(cut[last[each == 1]])),
            tokens=pc.sum(examples.column("length")).as_py() or 0,
            supervised_tokens=pc.sum(examples.column("supervised")).as_py() or 0,
            neutralised=outcomes.column("neutralised").true_count,
            turns_not_supervised=pc.sum(outcomes.column("turns_not_supervised")).as_py() or 0,
            marks_agree=marks.true_count,
            marks_disagree=marks.false_count,
        )
        inserted = pa.Table.from_batches([outcomes]).group_by(["inserted_before", "inserted_after"])
        for row in inserted.aggregate([([], "count_all")]).to_pylist():
            if row["inserted_before"] is not None:
                self.inserted[row["inserted_before"], row["inserted_after"]] += row["count_all"]
        for entry in pc.value_counts(outcomes.column("reason").drop_null()).to_pylist():
            self.reasons[entry["values"]] += entry["counts"]
        left_out = outcomes.filter(pc.equal(outcomes.column("reason"), Reason.FIELD_NOT_RENDERED))
        self.not_rendered.update(left_out.column("detail").to_pylist())

    def _inspect(self, examples: pa.RecordBatch) -> None:
        """Counts the examples about to be written that fail an invariant of the checks."""
        if not examples.num_rows:
            return
        ids, labels = (examples.column(name).flatten().to_numpy() for name in ("input_ids", "labels"))
        starts = examples.column("labels").offsets.to_numpy()[:-1]
        starts = starts - starts[0]
        supervised = labels != IGNORE_LABEL
        counted = examples.column("supervised").to_numpy()
        recounted = np.add.reduceat(supervised, starts, dtype=np.int64)
        self.broken["nothing supervised"] += int(np.count_nonzero(counted == 0))
        self.broken["position 0 supervised"] += int(np.count_nonzero(supervised[starts]))
        self.broken["label is not the input id"] += int(np.count_nonzero(supervised & (labels != ids)))
        weights = weights_of(examples)
        if weights is not None:
            self.broken["a label has no weight, or the other way round"] += int(
                np.count_nonzero((weights > 0) != supervised)
            )
        self.broken["supervised count is wrong"] += int(np.count_nonzero(recounted != counted))
        self.lengths.append(examples.column("length").to_numpy())
        self.supervised.append(counted)

    def _note_rejected(self, rejects: pa.RecordBatch, outcomes: pa.RecordBatch) -> None:
        noted = Counter(row["reason"] for row in self.first_rejected)
        details = outcomes.column("detail").filter(pc.is_valid(outcomes.column("reason"))).to_pylist()
        for row, detail in zip(rejects.to_pylist(), details, strict=True):
            (reason,) = row["reasons"]
            noted[reason] += 1
            if noted[reason] <= EXAMPLES_PER_REASON:
                origin = {k: row[k] for k in ("row_id", "file", "line")}
                self.first_rejected.append({**origin, "reason": reason, "detail": detail[:200]})

    def summed_up(self) -> dict[str, int]:
        """The sums that depend on the rows alone, not on how they were encoded."""
        encoding = ("tokenized", "reused", "by_columns", "by_rows", "compared")
        return {name: count for name, count in sorted(self.numbers.items()) if name not in encoding}

"""A second opinion on a sample of the rows, formed beside the work: in a process of its own where there are CPUs for it.

rows of the sample ─▶ row by row, by the reference ─▶ outcomes and examples, for the builder to compare with its own
                      prompt rendered and encoded again: is it a prefix of the row?
                      AutoTokenizer: would a server make the same of it?
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages import standby
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.conversation import Conversation, conversation
from sft_pipeline.stages.tokenized_rows.encode import Accepted, Example
from sft_pipeline.stages.tokenized_rows.encoding import Done, Encoders
from sft_pipeline.stages.tokenized_rows.outcomes import Outcome, outcome_of
from sft_pipeline.stages.tokenized_rows.rows import TOKENIZED, to_batch
from sft_pipeline.stages.tokenized_rows.skew import Skew, auto_tokenizer, find_skew, hide_torch
from sft_pipeline.stages.workers import worker_count
from sft_pipeline.store import Artifact

SAMPLE = 300  # rows whose prompt is rendered and encoded once more, by transformers too


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        outcomes: One per row of the sample, in their order.
        examples: Of the accepted ones, in the schema TOKENIZED.
        prompts: Rows whose prompt was rendered and encoded again.
        wrong_prompts: Those that do not begin with its ids.
        skew: Whether AutoTokenizer agrees. With nothing to compare, it does.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    examples: pa.Table = field(default_factory=TOKENIZED.empty_table)
    prompts: int = 0
    wrong_prompts: list[dict[str, Any]] = field(default_factory=list)
    skew: Skew = field(default_factory=Skew)


class Comparison:
    """What the builder made of the rows that the referee looks at."""

    def __init__(self) -> None:
        self.by_columns = 0
        self._row_ids: list[str] = []
        self._outcomes: list[Outcome] = []
        self._examples: list[pa.RecordBatch] = []

    def add(self, rows: pa.RecordBatch, done: Done, compare: npt.NDArray[np.bool_]) -> None:
        """Keeps the rows of a task that are to be compared."""
        if not compare.any():
            return
        self.by_columns += int(np.count_nonzero(done.by_columns & compare))
        chosen = pa.array(compare)
        self._row_ids += rows.column("row_id").filter(chosen).to_pylist()
        found = done.outcomes.filter(chosen).drop_columns(["key"])
        self._outcomes += [Outcome(**line) for line in found.to_pylist()]
        each = done.outcomes.column("examples").to_numpy()
        self._examples.append(done.examples.filter(pa.array(np.repeat(compare, each))))

    def first_difference(self, verdict: Verdict) -> str | None:
        """The id of a row of which the referee made something else."""
        ours = pa.Table.from_batches(self._examples, TOKENIZED)
        if self._outcomes == verdict.outcomes and ours.equals(verdict.examples):
            return None
        at = 0
        for row_id, mine, theirs in zip(self._row_ids, self._outcomes, verdict.outcomes, strict=True):
            count = mine.examples
            if mine != theirs or not ours.slice(at, count).equals(verdict.examples.slice(at, count)):
                return row_id
            at += count
        raise AssertionError("tables differ, but no row of them does")


class _Bench:
    """Looks at rows as they come (batches of grouped_split), and gives the verdict when asked with None.

    Args:
        skew: Whether AutoTokenizer is compared with.
    """

    def __init__(self, encoders: Encoders, skew: bool) -> None:
        self._encoders, self._skew = encoders, skew
        self._outcomes: list[Outcome] = []
        self._examples: list[pa.RecordBatch] = []
        self._sample: list[tuple[Conversation, Example]] = []

    def __call__(self, rows: pa.RecordBatch | None) -> Verdict | None:
        if rows is None:
            return self._verdict()
        by_row = self._encoders.by_row
        given = rows.to_pylist()
        results = by_row.encode(given)
        self._outcomes += map(outcome_of, results)
        self._examples.append(to_batch([e for r in results if isinstance(r, Accepted) for e in r.examples]))
        self._sample += [
            (by_row.guard.check(conversation(row, by_row.system)), result.examples[0])
            for row, result in zip(given, results, strict=True)
            if isinstance(result, Accepted) and not result.examples[0].truncated
        ][: SAMPLE - len(self._sample)]
        return None

    def _verdict(self) -> Verdict:
        sample = [given for given, _ in self._sample]
        found = Verdict(
            self._outcomes,
            pa.Table.from_batches(self._examples, TOKENIZED),
            len(sample),
            [wrong for given, example in self._sample if (wrong := self._wrong_prompt(given, example))],
            find_skew(self._encoders.tokenizer, self._encoders.template, sample) if self._skew and sample else Skew(),
        )  # fmt: skip
        self._outcomes, self._examples, self._sample = [], [], []
        return found

    def _wrong_prompt(self, given: Conversation, example: Example) -> dict[str, Any] | None:
        """How the row's beginning differs from the prompt that a server would send, if it does."""
        text = self._encoders.template.render(given.messages[:-1], given.tools, add_generation_prompt=True)
        prompt = self._encoders.tokenizer.ids(text)
        if example.input_ids[: example.prompt_length].tolist() == prompt:
            return None
        return {"row_id": example.row_id, "prompt_tokens": len(prompt), "recorded": example.prompt_length}


class Referee:
    """The builder's side. To be used as a context, which ends the process.

    Args:
        encoders: Used where there is no process of its own.
        skew: Whether AutoTokenizer is compared with.
    """

    def __init__(self, config: TokenizedRowsConfig, encoders: Encoders, *, skew: bool) -> None:
        self._here = _Bench(encoders, skew)
        # Where transformers is imported already, a small sample is looked at sooner than a process starts.
        alone = worker_count() == 1 or (skew and "transformers" in sys.modules)
        self._worker = None if alone else standby.take(_in_a_process, (config, skew))
        self._sent = 0

    def look_at(self, rows: pa.RecordBatch) -> None:
        """Hands rows over."""
        if self._worker is None:
            self._here(rows)
        elif rows.num_rows:
            self._worker.send(rows)
            self._sent += 1

    def verdict(self) -> Verdict:
        """What was found of the rows handed over so far; then it begins anew."""
        if self._worker is None:
            found = self._here(None)
        else:
            self._worker.send(None)
            for _ in range(self._sent):
                self._worker.receive()
            self._sent = 0
            found = self._worker.receive()
        assert found is not None
        return found

    def __enter__(self) -> "Referee":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.end()


def stand_by(config: TokenizedRowsConfig, earlier: Sequence[Artifact]) -> None:
    """Has a referee load what it needs while earlier stages are built."""
    standby.begin(_in_a_process, (config, Skew.of_earlier(earlier) is None))


def _in_a_process(config: TokenizedRowsConfig, skew: bool) -> Callable[[pa.RecordBatch | None], Verdict | None]:  # fmt: skip
    hide_torch()
    encoders = Encoders(config, columns=False)
    _ = encoders.by_row
    if skew:
        auto_tokenizer(str(encoders.tokenizer.folder), encoders.tokenizer.sha256)
    return _Bench(encoders, skew)

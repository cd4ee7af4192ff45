"""A second opinion on a sample of the rows, formed beside the work: in a process of its own where there are CPUs for it.

    rows of the sample ─▶ row by row, by the reference ─▶ outcomes and examples, for the builder to compare with its own
                          prompt rendered and encoded again: is it a prefix of the row?
                          AutoTokenizer: would a server make the same of it?

Where only few rows are to be encoded, this process does that too: it may have stood by with everything loaded.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages import standby
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.encode import Accepted, Example, Refused
from sft_pipeline.stages.tokenized_rows.encoding import Done, Encoders
from sft_pipeline.stages.tokenized_rows.formatting import formatting_of
from sft_pipeline.stages.tokenized_rows.outcomes import Outcome, outcome_of
from sft_pipeline.stages.tokenized_rows.pictures import Preview, previews_of
from sft_pipeline.stages.tokenized_rows.rows import to_batch
from sft_pipeline.stages.tokenized_rows.skew import Skew, auto_tokenizer, find_skew, hide_torch
from sft_pipeline.stages.workers import Answer, worker_count
from sft_pipeline.store import Artifact
from sft_pipeline.tables.schemas import TOKENIZED
from sft_pipeline.text.conversation import Conversation, conversation

if TYPE_CHECKING:
    from sft_pipeline.stages.tokenized_rows.batches import Batch

SAMPLE = 300  # rows whose prompt is rendered and encoded once more, by transformers too


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        formatting: What was used to format the rows, as formatting.json has it.
        outcomes: One per row that was looked at, in their order.
        examples: Of the accepted ones, in the schema TOKENIZED.
        prompts: Rows whose prompt was rendered and encoded again.
        wrong_prompts: Those that do not begin with its ids.
        skew: Whether AutoTokenizer agrees. With nothing to compare, it does.
    """

    formatting: dict[str, Any]
    outcomes: list[Outcome]
    examples: pa.Table
    prompts: int
    wrong_prompts: list[dict[str, Any]]
    skew: Skew


class Comparison:
    """What the builder made of the rows that the referee looks at."""

    def __init__(self) -> None:
        self.by_columns = 0
        self._row_ids: list[str] = []
        self._outcomes: list[Outcome] = []
        self._examples: list[pa.RecordBatch] = []

    def add(self, batch: "Batch", done: Done) -> None:
        """Keeps what was made of the batch's rows in the sample."""
        if not batch.sampled.any():
            return
        self.by_columns += int(np.count_nonzero(done.by_columns & batch.sampled))
        chosen = pa.array(batch.sampled)
        self._row_ids += batch.new.column("row_id").filter(chosen).to_pylist()
        found = done.outcomes.filter(chosen).select(Outcome._fields)
        self._outcomes += [Outcome(**line) for line in found.to_pylist()]
        each = done.outcomes.column("examples").to_numpy()
        self._examples.append(done.examples.filter(pa.array(np.repeat(batch.sampled, each))))

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
    """The referee's work.

    Args:
        skew: Whether AutoTokenizer is compared with.
    """

    def __init__(self, config: TokenizedRowsConfig, encoders: Encoders, skew: bool) -> None:
        self._config, self._encoders, self._compares_skew = config, encoders, skew
        self._forget()

    def _forget(self) -> None:
        self._outcomes: list[Outcome] = []
        self._examples: list[pa.RecordBatch] = []
        self._sample: list[Conversation] = []
        self._wrong_prompts: list[dict[str, Any]] = []
        self._skew: Skew | None = None

    def __call__(self, wanted: tuple[Any, ...]) -> Any:
        name, *arguments = wanted
        return getattr(self, name)(*arguments)

    def look_at(self, rows: pa.RecordBatch) -> None:
        given = rows.to_pylist()
        results = self._encoders.by_row.encode(given)
        self._outcomes += map(outcome_of, results)
        self._examples.append(to_batch([e for r in results if isinstance(r, Accepted) for e in r.examples]))
        self._take_sample(given, results)

    def encode(self, rows: pa.RecordBatch, sampled: npt.NDArray[np.bool_], by_rows: bool) -> Done:
        if not by_rows:
            return self._encoders(rows)
        done, given, results = self._encoders.encode(rows, fast=None)
        chosen = np.flatnonzero(sampled).tolist()
        self._take_sample([given[i] for i in chosen], [results[i] for i in chosen])
        return done

    def _take_sample(self, rows: Sequence[dict[str, Any]], results: Sequence[Accepted | Refused]) -> None:
        by_row = self._encoders.by_row
        new: list[tuple[Conversation, Example]] = []
        for row, result in zip(rows, results, strict=True):
            if len(self._sample) + len(new) == SAMPLE:
                break
            if isinstance(result, Accepted) and not result.examples[0].truncated:
                new.append((by_row.guard.check(conversation(row, by_row.system)), result.examples[0]))
        self._sample += [given for given, _ in new]
        self._wrong_prompts += self._find_wrong_prompts(new)
        if len(self._sample) == SAMPLE:
            self._find_skew()  # now, while others still work

    def _find_skew(self) -> Skew:
        if self._skew is None:
            found = self._compares_skew and self._sample
            self._skew = (
                find_skew(self._encoders.tokenizer, self._encoders.template, self._sample)
                if found
                else Skew()
            )
        return self._skew

    def preview(self, examples: list[dict[str, Any]]) -> list[Preview]:
        return previews_of(self._encoders.tokenizer, examples)

    def verdict(self) -> Verdict:
        found = Verdict(
            formatting_of(self._config, self._encoders.tokenizer, self._encoders.template),
            self._outcomes,
            pa.Table.from_batches(self._examples, TOKENIZED),
            len(self._sample),
            self._wrong_prompts,
            self._find_skew(),
        )
        self._forget()
        return found

    def _find_wrong_prompts(self, rows: Sequence[tuple[Conversation, Example]]) -> Iterator[dict[str, Any]]:
        """How the beginnings of rows differ from the prompts that a server would send, where they do."""
        template, tokenizer = self._encoders.template, self._encoders.tokenizer
        texts = [
            template.render(given.messages[:-1], given.tools, add_generation_prompt=True) for given, _ in rows
        ]
        for (_, example), prompt in zip(rows, tokenizer.encode_batch(texts), strict=True):
            if example.input_ids[: example.prompt_length].tolist() != prompt.ids:
                yield {
                    "row_id": example.row_id,
                    "prompt_tokens": len(prompt.ids),
                    "recorded": example.prompt_length,
                }


class Referee:
    """The builder's side. To be used as a context, which ends the process.

    Args:
        encoders: Used where there is no process of its own.
        skew: Whether AutoTokenizer is compared with.
    """

    def __init__(self, config: TokenizedRowsConfig, encoders: Encoders, *, skew: bool) -> None:
        self._here = _Bench(config, encoders, skew)
        # Where transformers is imported already, a small sample is looked at sooner than a process starts.
        alone = worker_count() == 1 or (skew and "transformers" in sys.modules)
        self._worker = None if alone else standby.take(_in_a_process, (config, skew))
        self._looks: list[Answer] = []
        self._to_look_at: deque[pa.RecordBatch] = deque()

    def _ask(self, *wanted: Any) -> Answer:
        return self._worker.ask(wanted) if self._worker else Answer.known(self._here(wanted))

    def look_at(self, rows: pa.RecordBatch) -> None:
        """Hands rows over for the verdict."""
        if rows.num_rows:
            self._looks.append(self._ask("look_at", rows))

    def encode(self, rows: pa.RecordBatch, sampled: npt.NDArray[np.bool_], *, by_rows: bool) -> Answer:
        """Has rows encoded, and looks at some of them for the verdict; the answer is a `Done`."""
        answer = self._ask("encode", rows, sampled, by_rows)
        if not by_rows:  # two looks at a time, so that nobody waits long for the next rows
            self._to_look_at.append(rows.filter(pa.array(sampled)))
            if sum(not look.is_here for look in self._looks[-2:]) < 2:
                self.look_at(self._to_look_at.popleft())
        return answer

    def preview(self, examples: list[dict[str, Any]]) -> Answer:
        """Has a picture of examples prepared; the answer is a list of `Preview`."""
        return self._ask("preview", examples)

    def verdict(self) -> Verdict:
        """What was found of the rows so far; then it begins anew."""
        while self._to_look_at:
            self.look_at(self._to_look_at.popleft())
        verdict = self._ask("verdict")
        for look in self._looks:
            look.get()
        self._looks = []
        return verdict.get()

    def __enter__(self) -> "Referee":
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.end()


def stand_by(config: TokenizedRowsConfig, earlier: Sequence[Artifact]) -> None:
    """Has a referee load what it needs while earlier stages are built."""
    standby.begin(_in_a_process, (config, Skew.of_earlier(earlier) is None))


def _in_a_process(config: TokenizedRowsConfig, skew: bool) -> Callable[[tuple[Any, ...]], Any]:
    hide_torch()
    encoders = Encoders(config, columns=True)
    _ = encoders.by_row
    if (
        not skew
    ):  # that was found by an earlier build, so most rows are probably known and the others are encoded here
        encoders.rehearse()
    else:
        auto_tokenizer(str(encoders.tokenizer.folder), encoders.tokenizer.sha256)
    return _Bench(config, encoders, skew)

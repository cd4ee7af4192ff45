"""Judges one model on one held-out side: the loss of every row, and the graders' scores of the generated replies."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.evaluation.graders import Grader
from sft_pipeline.tables.held_out import HeldOut, held_out_rows
from sft_pipeline.tables.parquet import count_rows, read_batches
from sft_pipeline.text.reply import Speech
from sft_pipeline.training.generate import Reply, generate, score_nll
from sft_pipeline.training.threads import threads_for

ROWS_AT_ONCE = 4096
T = TypeVar("T")


@dataclass(frozen=True)
class Side:
    """A held-out side of tokenized_rows.

    Attributes:
        parts: Its Parquet parts.
        positions: The rows that are generated.
    """

    name: str
    parts: list[Path]
    positions: list[int]


@dataclass(frozen=True)
class Judgement:
    """What one model did on one side.

    Attributes:
        nll: Summed negative log-likelihood (nats) of each row's supervised tokens, all rows of the side.
        tokens: Their number for each row.
        scores: For each grader, one score for each generated row.
        unfinished: Replies cut at `max_new_tokens`.
    """

    nll: np.ndarray
    tokens: np.ndarray
    scores: dict[str, np.ndarray]
    unfinished: int

    @property
    def loss(self) -> float:
        """The summed NLL divided by the number of tokens; NaN where there are none."""
        total = int(self.tokens.sum())
        return float(self.nll.sum()) / total if total else float("nan")

    def means(self) -> dict[str, float]:
        """Each grader's mean over all generated rows; NaN where there are none."""
        return {name: float(s.sum()) / len(s) if len(s) else float("nan") for name, s in self.scores.items()}


class _Span(Reporter):
    """One progress bar over several pieces of work."""

    def __init__(self, to: Reporter, name: str, total: int) -> None:
        self.to, self.name, self.total, self.before = to, name, total, 0

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        self.to.progress(self.name, self.before + done, self.total, "rows")

    def passed(self, count: int) -> None:
        self.before += count
        self.to.progress(self.name, self.before, self.total, "rows")


def judge(
    model: Any,
    side: Side,
    config: EvaluationConfig,
    graders: Sequence[Grader],
    speech: Speech,
    report: Reporter,
    *,
    name: str,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> Judgement:
    """Scores a model on a side, a few thousand rows at a time.

    Args:
        name: Of the progress, for example "evaluating step 200".
        keep: Is given the sample rows: row_id, group, prompt, reply, expected, finished, and each grader's score.
    """
    with threads_for(model):
        return _judge(
            model,
            side,
            config,
            graders,
            speech,
            _Span(report, name, count_rows(side.parts) + len(side.positions)),
            keep,
        )


def _judge(
    model: Any,
    side: Side,
    config: EvaluationConfig,
    graders: Sequence[Grader],
    speech: Speech,
    span: _Span,
    keep: Callable[[list[dict[str, Any]]], None],
) -> Judgement:
    nll, tokens = _losses(model, side, span)
    scores: dict[str, list[float]] = {g.name: [] for g in graders}
    unfinished = 0
    for rows in _chunks(held_out_rows(side.parts, side.positions), ROWS_AT_ONCE):
        replies = _replies(model, rows, config, speech, span)
        samples = []
        for row, reply in zip(rows, replies):
            prompt, (text, finished) = speech.decode(row.prompt), spoken(row, reply, speech)
            seen = {"row_id": row.row_id, "group": row.group, "prompt": prompt, "completion": row.completion}
            graded = {g.name: g(text, row.completion, seen) for g in graders}
            for grader, score in graded.items():
                scores[grader].append(score)
            unfinished += not finished
            samples.append(
                {
                    "row_id": row.row_id,
                    "group": row.group,
                    "prompt": prompt,
                    "reply": text,
                    "expected": row.completion,
                    "finished": finished,
                    "scores": graded,
                }
            )
        keep(samples)
        span.passed(len(rows))
    return Judgement(nll, tokens, {n: np.asarray(s, dtype=np.float64) for n, s in scores.items()}, unfinished)


def spoken(row: HeldOut, reply: Reply, speech: Speech) -> tuple[str, bool]:
    """(the reply as text, whether it ended by itself).

    What the template itself puts around every answer (an empty thinking block, say) is taken off: the model has
    learned to say it, and the expected completion is without it.
    """
    text, learned, finished = speech.decode(reply.ids), speech.decode(row.target), reply.finished
    if speech.stop_text and speech.stop_text in text:
        text, finished = text.partition(speech.stop_text)[0], True
    before, found, after = learned.partition(row.completion)
    if found and before.strip():
        text = text.removeprefix(before)
    if found and after.strip():
        text = text.removesuffix(after)
    return text, finished


def _losses(model: Any, side: Side, span: _Span) -> tuple[np.ndarray, np.ndarray]:
    sums: list[float] = []
    counts: list[int] = []
    for batch in read_batches(side.parts, ["input_ids", "labels"], ROWS_AT_ONCE):
        ids, labels = batch.column("input_ids"), batch.column("labels")
        examples: Any = [(np.array(i.values), np.array(y.values)) for i, y in zip(ids, labels)]
        for total, count in score_nll(model, examples, report=span):
            sums.append(total)
            counts.append(count)
        span.passed(len(examples))
    return np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.int64)


def _replies(
    model: Any, rows: Sequence[HeldOut], config: EvaluationConfig, speech: Speech, span: _Span
) -> list[Reply]:
    """A reply to each row. Greedily, equal prompts have equal replies, and each is generated once."""
    prompts = [tuple(r.prompt) for r in rows]
    decoding = config.decoding
    if decoding.temperature > 0:
        distinct = prompts
        decoding = decoding.model_copy(update={"seed": decoding.seed + rows[0].position})
    else:
        distinct = list(dict.fromkeys(prompts))
    replies = generate(
        model,
        [list(p) for p in distinct],
        max_new_tokens=config.max_new_tokens,
        stop_ids=set(speech.stop_ids),
        pad_id=speech.pad_id,
        batch_size=config.batch_size,
        decoding=decoding,
        report=span,
    )
    if len(distinct) == len(prompts):
        return replies
    by_prompt = dict(zip(distinct, replies))
    return [by_prompt[p] for p in prompts]


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk

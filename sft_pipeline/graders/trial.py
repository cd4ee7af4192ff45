"""Every grader run on a few rows before anything is trained: what would fail at the end fails here."""

from collections.abc import Sequence
from typing import Any

from sft_pipeline.graders.config import GraderConfig
from sft_pipeline.graders.graders import Grader, check_expected, make_graders
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOutRow, chosen_positions, held_out_rows
from sft_pipeline.text.reply import ReplyDecoder

ROWS = 8  # of each held-out split
# Replies as untrained models give them: a grader that raises on one would end the evaluation.
ODD_REPLIES = ("no", "{", "null", "-", "9" * 5000)


def try_graders(
    configs: Sequence[GraderConfig], tokenized: Artifact, max_rows: int | None
) -> list[dict[str, Any]]:
    """Runs the graders on held-out rows: expected completions as replies, and replies that fit nothing.

    Args:
        max_rows: Rows of each split that evaluation generates; whether the graders can grade against the
            expected completions is asked of exactly these.

    Returns:
        For each grader: its name, the mean score of expected completions (1 where a perfect model would reach
        1) and of the odd replies; both None where no split has rows.

    Raises:
        InputError: A grader cannot be used, raises, returns something that is no score, or fits no expected
            completion; the message names it and the row.
    """
    graders = make_graders(configs)
    if not graders:
        return []
    decoder = ReplyDecoder.of(tokenized)
    tried: list[tuple[HeldOutRow, str]] = []
    for split in ("validation", "test"):
        parts = tokenized.parts(split)
        expected: list[tuple[str, str]] = []
        for row in held_out_rows(parts, chosen_positions(parts, max_rows)):
            text = decoder.expected(row.target, row.completion)
            if len(expected) < ROWS:
                tried.append((row, text))
            expected.append((row.row_id, text))
        if expected:
            check_expected(graders, expected)
    return [_try(grader, tried, decoder) for grader in graders]


def _try(grader: Grader, tried: Sequence[tuple[HeldOutRow, str]], decoder: ReplyDecoder) -> dict[str, Any]:
    own, odd = [], []
    for row, expected in tried:
        known = {
            "row_id": row.row_id,
            "group": row.group,
            "prompt": decoder.decode(row.prompt),
            "completion": expected,
        }
        own.append(grader(expected, expected, known))
        odd += [grader(reply, expected, known) for reply in ODD_REPLIES]
    return {"grader": grader.name, "expected_completions": _mean(own), "odd_replies": _mean(odd)}


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None

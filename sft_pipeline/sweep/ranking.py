"""The order of a sweep's trials: by the recipe's own rule, then those that could not be judged, with why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.evaluation.select import Candidate, Gate, select

# How a trial can end, from the one that says most about it to the one that says least.
ENDS = ("judged", "diverged", "blocked", "bad input", "failed", "pending")
JUDGED, DIVERGED, BLOCKED, BAD_INPUT, FAILED, PENDING = ENDS


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended.

    Attributes:
        status: One of `ENDS`.
        scores: What it scored on the validation split, where it was judged; None where nothing could be
            measured.
        reason: Why it was not judged, or what is wrong with its curve.
    """

    status: str
    scores: Mapping[str, float | None]
    reason: str = ""


@dataclass(frozen=True)
class Rank:
    """A trial's rank from 1, whether it passed the gates (None: not judged), and both in words."""

    number: int
    gates_passed: bool | None
    verdict: str


def ranks_of(ends: Mapping[int, TrialEnd], rule: EvaluationConfig) -> dict[int, Rank]:
    """{trial: rank}: gates first, then `rank_by`; ties go to the earlier trial.

    Args:
        ends: By the trial's number.
    """
    judged = [Candidate(n, _numbers(e.scores)) for n, e in ends.items() if e.status == JUDGED]
    found: dict[int, Rank] = {}
    if judged:
        for row in select(judged, [Gate.parse(g) for g in rule.gates], rule.rank_by).table:
            passed = row["gates"] == "passed"
            verdict = f"gates {row['gates']}" if rule.gates else "no gates set"
            reason = ends[row["step"]].reason
            found[row["step"]] = Rank(row["rank"], passed, f"{verdict}; {reason}" if reason else verdict)
    others = sorted(
        (n for n, e in ends.items() if e.status != JUDGED), key=lambda n: (ENDS.index(ends[n].status), n)
    )
    for rank, number in enumerate(others, len(judged) + 1):
        end = ends[number]
        found[number] = Rank(rank, None, f"{end.status}: {end.reason}" if end.reason else end.status)
    return found


def _numbers(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in scores.items()}


def outcome(ends: Sequence[TrialEnd]) -> tuple[str, int]:
    """(status, exit code) of a sweep: done as soon as one trial was judged, else what stopped all of them."""
    kinds = {end.status for end in ends}
    if JUDGED in kinds:
        return "done", 0
    if kinds <= {DIVERGED, BLOCKED}:
        return "blocked", BlockedError.exit_code
    return "failed", InputError.exit_code if kinds == {BAD_INPUT} else 1

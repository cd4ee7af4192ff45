"""The recipe's rule over the trials; what could not be judged comes last, with the reason."""

from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.plots.sweep import plot_curves, plot_ranking
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.stage import Branch
from sft_pipeline.sweep.plan import Trial
from sft_pipeline.sweep.ranking import (
    BAD_INPUT,
    BLOCKED,
    DIVERGED,
    FAILED,
    JUDGED,
    Rank,
    TrialEnd,
    outcome,
    ranks_of,
)
from sft_pipeline.sweep.trial import TrialResult

RULE = EvaluationConfig(
    graders=[{"name": "form", "kind": "exact_match"}, {"name": "right", "kind": "exact_match"}],
    gates=["form >= 0.9"],
    rank_by=["right", "-val_loss"],
)


def judged(form: float, right: float | None, val_loss: float, reason: str = "") -> TrialEnd:
    return TrialEnd(JUDGED, {"form": form, "right": right, "val_loss": val_loss}, reason)


def test_gates_come_before_ranking_and_the_loss_breaks_ties() -> None:
    ends = {
        1: judged(0.5, 1.0, 0.1),
        2: judged(0.95, 0.4, 0.3),
        3: judged(0.95, 0.4, 0.2),
        4: judged(1.0, None, 0.1),
    }
    found = ranks_of(ends, RULE)
    assert [found[n].number for n in ends] == [4, 2, 1, 3]
    assert found[1].verdict == "gates failed: form >= 0.9" and found[1].gates_passed is False
    assert found[3].verdict == "gates passed"


def test_what_was_not_judged_is_last_with_its_reason() -> None:
    ends = {
        1: TrialEnd(FAILED, {}, "killed"),
        2: TrialEnd(DIVERGED, {}, "the loss of update 3 is nan"),
        3: judged(0.1, 0.1, 9.0, "the loss rose"),
        4: TrialEnd(BLOCKED, {}, "boundaries"),
    }
    found = ranks_of(ends, RULE)
    assert [found[n].number for n in ends] == [4, 2, 1, 3]
    assert found[2].verdict == "diverged: the loss of update 3 is nan" and found[2].gates_passed is None
    assert found[3].verdict == "gates failed: form >= 0.9; the loss rose"


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([JUDGED, FAILED], ("done", 0)),
        ([BLOCKED, DIVERGED], ("blocked", 3)),
        ([BAD_INPUT, BAD_INPUT], ("failed", 2)),
        ([BLOCKED, FAILED], ("failed", 1)),
    ],
)
def test_what_became_of_the_sweep(kinds: list[str], expected: tuple[str, int]) -> None:
    assert outcome([TrialEnd(kind, {}) for kind in kinds]) == expected


@pytest.mark.parametrize("rank_by", [["-val_loss"], ["right", "-val_loss"]])
@pytest.mark.parametrize(
    "values",
    [
        [{"a.r": 8}, {"a.r": 64}],
        [{"a.t": "x", "a.r": 8}, {"a.t": "y", "a.r": 8}],
        [{"a.t": None}, {"a.t": [1]}],
    ],
)
@pytest.mark.parametrize("scores", [{"right": 0.5, "val_loss": 0.1}, {"right": None, "val_loss": None}])
def test_every_kind_of_sweep_has_its_plots(
    tmp_path: Path, values: list[dict[str, Any]], scores: dict[str, Any], rank_by: list[str]
) -> None:
    branch = Branch(DatasetConfig(name="d", sources=[{"path": "rows"}]), "s1")
    results = [
        TrialResult(
            Trial(n, v, branch),
            TrialEnd(JUDGED, scores),
            loss=[(10, 3.0), (20, 2.0)],
            val_loss=[(0, 3.1), (20, 2.1)],
        )
        for n, v in enumerate(values, 1)
    ]
    plot_curves(tmp_path / "curves.png", results)
    plot_ranking(tmp_path / "ranking.png", [(r, Rank(r.trial.number, True, "")) for r in results], rank_by)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "ranking.png"))

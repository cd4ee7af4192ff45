"""What an evaluation's names, gates and ranking may be: refused when the file is loaded, not at its end."""

from typing import Any

import pytest
from pydantic import ValidationError

from sft_pipeline.stages.evaluation.config import CHECKPOINT_KEYS, SAMPLE_COLUMNS, EvaluationConfig


def config(name: str = "rate", kind: str = "exact_match", **evaluation: Any) -> EvaluationConfig:
    grader = {"name": name, "kind": kind} | ({"callable": "mine:score"} if kind == "python" else {})
    return EvaluationConfig.model_validate({"graders": [grader], **evaluation})


@pytest.mark.parametrize(
    "name",
    [
        *SAMPLE_COLUMNS,
        *CHECKPOINT_KEYS,
        "test_loss",
        "",
        " ",
        "-rate",
        "9",
        "a b",
        "rate\n",
        "rate%",
        "größe/x",
    ],
)
def test_a_grader_cannot_take_a_name_that_something_else_has_or_no_metric_can_have(name: str) -> None:
    with pytest.raises(ValidationError, match="a grader cannot be named"):
        config(name)


@pytest.mark.parametrize("name", ["rate", "Rate_2", "policy.pass-rate", "loss", "test_loss_2"])
def test_other_names_are_taken(name: str) -> None:
    assert config(name, rank_by=[name, "-val_loss"], gates=[f"{name} >= 0.5"]).graders[0].name == name


@pytest.mark.parametrize(
    ("rank_by", "said"),
    [
        (["val_loss"], "write -val_loss"),
        (["--rate"], "no grader is named -rate"),
        (["rates"], "known: rate, val_loss"),
        ([""], "no grader is named"),
        ([], "at least 1 item"),
    ],
)
def test_a_ranking_that_would_let_the_worst_win_is_refused(rank_by: list[str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(rank_by=rank_by)


@pytest.mark.parametrize(
    "gate",
    ["rate >= 1.01", "rate > 1", "rate < 0", "rate <= -0.1", "rate == 2", "val_loss < 0", "val_loss <= -1"],
)
def test_a_gate_that_nothing_can_meet_is_refused(gate: str) -> None:
    with pytest.raises(ValidationError, match="can meet it"):
        config(gates=[gate])


@pytest.mark.parametrize(
    "gate", ["rate >= nan", "rate >= inf", "rate >= x", "rate => 1", "rate 1", "other >= 1"]
)
def test_a_gate_that_says_nothing_is_refused(gate: str) -> None:
    with pytest.raises(ValidationError, match="gate"):
        config(gates=[gate])


@pytest.mark.parametrize("gate", ["rate >= 1", "rate > 0.99", "rate <= 0", "rate == 1", "val_loss < 3"])
def test_gates_that_can_be_met_are_taken(gate: str) -> None:
    assert config(gates=[gate]).gates == [gate]


def test_a_python_graders_scores_are_its_own() -> None:
    assert config(kind="python", gates=["rate >= 5"]).gates == ["rate >= 5"]

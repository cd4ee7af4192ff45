"""`sft check`: what a training will consist of, update by update, before it starts."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from sft_pipeline.cli.branch import find_branch
from sft_pipeline.cli.check import check_recipe, show_check
from sft_pipeline.errors import InputError
from sft_pipeline.stages.graph import STAGES

SILENT = Console(file=io.StringIO())


def test_the_budget_of_an_update_and_the_learning_rate_schedule(home: Path) -> None:
    result = check_recipe(
        "access_policy_lora", snapshot=None, overrides=["training.max_steps=200"], console=SILENT
    )
    assert result["valid"] and result["budget"]["updates"] == 484
    for name in ("examples", "tokens", "supervised_tokens"):
        assert set(result["budget"][f"{name}_per_update"]) == {"mean", "min", "max", "cv"}
    schedule = result["schedule"]
    assert (schedule["updates"], schedule["warmup_updates"], schedule["peak"]) == (200, 10, 4e-3)
    curve = schedule["curve"]
    assert len(curve) <= 50 and curve[0][0] == 1 and curve[-1][0] == 200
    assert [11, 4e-3] in curve and curve[-1][1] < 1e-5

    shown = io.StringIO()
    show_check(result, Console(file=shown, width=120))
    for words in (
        "200 of 484 planned",
        "▁",
        "█",
        "supervised tokens",
        "cv",
        "cosine: up to 0.004 in 10 updates",
    ):
        assert words in shown.getvalue()


def test_the_blocks_of_an_update_are_a_product_only_where_they_are_one(home: Path) -> None:
    def line(*overrides: str) -> str:
        result = check_recipe("access_policy_lora", snapshot=None, overrides=overrides, console=SILENT)
        shown = io.StringIO()
        show_check(result, Console(file=shown, width=120))
        return next(text for text in shown.getvalue().splitlines() if "blocks per update" in text)

    assert "4 = 4 per device x 1 accumulated x 1 processes" in line("training.per_device_batch=4")
    given = line("training.per_device_batch=4", "training.blocks_per_update=16")
    assert "16, as given by training.blocks_per_update" in given


def test_a_reporter_that_is_not_installed_is_known_before_any_data_is_read(home: Path, monkeypatch) -> None:
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "wandb" else found(name, *a))
    with pytest.raises(InputError, match=r"training\.report_to wandb.*sft-pipeline\[wandb\]"):
        check_recipe(
            "access_policy_lora", snapshot=None, overrides=["training.report_to=[wandb]"], console=SILENT
        )
    assert not (home / "objects").exists() or not list((home / "objects").iterdir())
    # Where nothing is trained nobody asks: such a recipe is shown, and its data is prepared, all the same.
    for stage in STAGES.values():
        stage.config(find_branch("access_policy_lora", None, ["training.report_to=[wandb]"], SILENT)[1])


def test_a_grader_that_fits_no_completion_is_a_problem(home: Path) -> None:
    def problems(field: str) -> list[str]:
        grader = f"evaluation.graders=[{{name: f, kind: json_fields, fields: [{field}]}}]"
        overrides = [grader, "evaluation.gates=[]", "evaluation.rank_by=[-val_loss]"]
        found = check_recipe("access_policy_lora", snapshot=None, overrides=overrides, console=SILENT)
        return found["problems"]

    assert problems("decision") == []
    [problem] = problems("decison")
    assert "grader f" in problem and "'decison'" in problem and "misspelt" in problem

"""`sft check`: what a training will consist of, update by update, before it starts."""

import io
from pathlib import Path

from rich.console import Console

from sft_pipeline.cli.check import check_recipe, show_check

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

"""The sanity check of the embedded recipe: quick where it is sound, and in the way where its learning rate is not."""

import re
from pathlib import Path

import pytest

from sft_pipeline_tests.command import sft

BOUND_SECONDS = 60  # on 2 cores; measured: 16 to 20


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanity")


def test_the_embedded_recipe_passes_in_under_a_minute(checked: Path) -> None:
    ran = sft("run", "access_policy_lora", "--until", "sanity_check", "--json", home=checked)
    assert ran.code == 0, ran.stderr[-3000:]
    took = re.search(r"access_policy_lora/sanity_check built, ([\d.]+) s", ran.stderr)
    assert took and float(took[1]) < BOUND_SECONDS, ran.stderr[-3000:]


def test_a_learning_rate_of_one_stops_it_before_the_training(checked: Path) -> None:
    ran = sft("run", "access_policy_lora", "--set", "training.learning_rate=1.0", "--json", home=checked)
    assert ran.code == 3 and ran.json["status"] == "blocked"
    [stopped] = [c for c in ran.json["checks"] if c["blocking"] and not c["passed"]]
    assert stopped["name"] == "short_run_stable" and "Lower training.learning_rate" in stopped["description"]
    assert "trained_checkpoints" not in (ran.json["artifacts"] or {})

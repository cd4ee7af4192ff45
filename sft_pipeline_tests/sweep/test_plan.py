"""Equal budgets in supervised tokens."""

import numpy as np
import pytest

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.sweep.plan import (
    PlannedUpdates,
    SweepBudget,
    budget_of,
    off_budget,
    updates_within,
    within_budget,
)
from sft_pipeline.training.schedule import Schedule, curve


def plan(*supervised: int) -> PlannedUpdates:
    return PlannedUpdates(np.array(supervised), np.array(supervised) * 4)


@pytest.mark.parametrize(
    ("planned", "max_steps", "asked", "updates"),
    [
        (484, None, None, 48),
        (100, None, None, 20),
        (8, None, None, 8),
        (9000, None, None, 200),
        (484, 10, None, 10),
        (484, None, 30, 30),
    ],
)
def test_the_budget_is_a_tenth_within_bounds_or_as_asked(
    planned: int, max_steps: int | None, asked: int | None, updates: int
) -> None:
    assert budget_of(plan(*[100] * planned), max_steps, asked) == SweepBudget(updates, 100 * updates)


def test_more_updates_than_planned_are_refused() -> None:
    with pytest.raises(InputError, match="the recipe's plan has 8 updates"):
        budget_of(plan(*[100] * 8), None, 9)


def test_each_trial_gets_as_many_updates_as_come_nearest() -> None:
    budget = SweepBudget(10, 1000)
    assert updates_within(plan(*[100] * 50), budget) == 10
    assert updates_within(plan(*[300] * 50), budget) == 3
    assert updates_within(plan(*[400] * 50), budget) == 2  # 800 and 1,200 are equally near
    assert updates_within(plan(*[5000] * 50), budget) == 1
    assert updates_within(plan(*[100] * 5), budget) == 5  # all there is
    assert off_budget(900, budget) == pytest.approx(-0.1)


def test_a_trials_schedule_is_complete_within_it() -> None:
    recipe = RecipeConfig(
        name="r",
        dataset="d",
        model={"base": "x"},
        training={"warmup": 0.2, "early_stopping": {"patience": 1}},
    )
    training = within_budget(recipe, 20).training
    assert (training.max_steps, training.eval_steps, training.save_steps) == (20, 5, 20)
    assert training.early_stopping is None
    rates = curve(20, Schedule.of(training, recipe.model))
    assert rates.index(max(rates)) == 4 and rates[-1] < 0.02 * max(rates)

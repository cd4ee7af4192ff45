"""Equal budgets: every point trains on about the same number of supervised tokens, whatever its updates hold."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact

SHARE, LEAST_UPDATES, MOST_UPDATES = 0.1, 20, 200
TOLERANCE = 0.05
EVALUATIONS = 4


@dataclass(frozen=True)
class PlannedUpdates:
    """What each update of a plan holds; int64 [updates]."""

    supervised: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @classmethod
    def read(cls, packed: Artifact) -> "PlannedUpdates":
        table = pq.read_table(packed.file("plan.parquet"), columns=["update", "supervised", "tokens"])
        update = table["update"].to_numpy()
        supervised, tokens = (
            np.bincount(update, weights=table[name].to_numpy()).astype(np.int64)
            for name in ("supervised", "tokens")
        )
        return cls(supervised, tokens)

    def __len__(self) -> int:
        return len(self.supervised)


@dataclass(frozen=True)
class Budget:
    """What every point may spend.

    Attributes:
        updates: Of the recipe's own plan.
        supervised: Their supervised tokens, which is what is equal between the points.
    """

    updates: int
    supervised: int


def budget_of(plan: PlannedUpdates, max_steps: int | None, updates: int | None) -> Budget:
    """The first updates of the recipe's own plan: as many as asked for, or a tenth of what the recipe trains, though
    20 at least and 200 at most.

    Raises:
        InputError: More updates are asked for than the plan has.
    """
    if updates is not None and updates > len(plan):
        raise InputError(
            f"--updates {updates}: the recipe's plan has {len(plan)} updates. Take fewer, or raise training.epochs"
        )
    recipes = min(len(plan), max_steps or len(plan))
    n = updates or min(recipes, max(LEAST_UPDATES, min(MOST_UPDATES, round(SHARE * recipes))))
    return Budget(n, int(plan.supervised[:n].sum()))


def updates_within(plan: PlannedUpdates, budget: Budget) -> int:
    """How many updates of a plan come nearest to the budget; the fewer of two that are equally near."""
    spent = np.cumsum(plan.supervised)
    return int(np.argmin(np.abs(spent - budget.supervised))) + 1


def off_budget(supervised: int, budget: Budget) -> float:
    """By which share a point is above (or below) the budget."""
    return supervised / budget.supervised - 1 if budget.supervised else 0.0


def within_budget(recipe: RecipeConfig, updates: int) -> RecipeConfig:
    """The recipe as a trial of so many updates.

    `max_steps` is the total that the schedule is made for, so that warm-up and decay are complete within the trial.
    Nothing stops it early, since then the budgets were not equal; its one checkpoint is the last update's.
    """
    training: dict[str, Any] = {
        "max_steps": updates,
        "eval_steps": math.ceil(updates / EVALUATIONS),
        "save_steps": updates,
        "early_stopping": None,
        "keep_checkpoints": None,
        "report_to": [],
    }
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})

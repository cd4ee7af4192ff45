"""All trials of a sweep with their data and their budgets, before anything is trained."""

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from sft_pipeline.config.load import Catalog, find_recipe
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.environment import accelerator
from sft_pipeline.stages.run import Run, run_until
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import remove_tree, sha256_json
from sft_pipeline.sweep.grid import Grid, label_of, values_of
from sft_pipeline.sweep.stages import TRIAL_STAGES
from sft_pipeline.training.flops import training_seconds
from sft_pipeline.training.memory import estimate

DATA_CONFIGS = ("tokenized_rows", "packed_shards")
SHARE, LEAST_UPDATES, MOST_UPDATES = 0.1, 20, 200  # the budget, of the updates that the recipe trains
TOLERANCE = 0.05  # a trial that is off the budget by more is marked
EVALUATIONS = 4


@dataclass(frozen=True)
class PlannedUpdates:
    """What each update of a plan holds; int64 [updates]."""

    supervised: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    @classmethod
    def read(cls, packed: Artifact) -> "PlannedUpdates":
        table = pq.read_table(packed.file("plan.parquet"), columns=["update", "supervised", "tokens"])
        update = table["update"].to_numpy() - 1
        supervised, tokens = (
            np.bincount(update, weights=table[name].to_numpy()).astype(np.int64)
            for name in ("supervised", "tokens")
        )
        return cls(supervised, tokens)

    def __len__(self) -> int:
        return len(self.supervised)


@dataclass(frozen=True)
class SweepBudget:
    """What every trial may spend.

    Attributes:
        updates: Of the recipe's own plan.
        supervised: Their supervised tokens, which is what is equal between the trials.
    """

    updates: int
    supervised: int


def budget_of(plan: PlannedUpdates, max_steps: int | None, updates: int | None) -> SweepBudget:
    """The first updates of the recipe's own plan: as many as asked for, or a tenth of what the recipe trains.

    A tenth is raised to 20 updates or lowered to 200.

    Raises:
        InputError: More updates are asked for than the plan has.
    """
    if updates is not None and updates > len(plan):
        raise InputError(
            f"--updates {updates}: the recipe's plan has {len(plan)} updates. "
            "Take fewer, or raise training.epochs"
        )
    recipes = min(len(plan), max_steps or len(plan))
    n = updates or min(recipes, max(LEAST_UPDATES, min(MOST_UPDATES, round(SHARE * recipes))))
    return SweepBudget(n, int(plan.supervised[:n].sum()))


def updates_within(plan: PlannedUpdates, budget: SweepBudget) -> int:
    """How many updates of a plan come nearest to the budget; the fewer of two that are equally near."""
    spent = np.cumsum(plan.supervised)
    return int(np.argmin(np.abs(spent - budget.supervised))) + 1


def off_budget(supervised: int, budget: SweepBudget) -> float:
    """By which share a trial is above (or below) the budget."""
    return supervised / budget.supervised - 1 if budget.supervised else 0.0


def within_budget(recipe: RecipeConfig, updates: int) -> RecipeConfig:
    """The recipe as a trial of so many updates.

    `max_steps` is the total that the schedule is made for, so that warm-up and decay are complete within the
    trial. Nothing stops it early, since then the budgets were not equal; its one checkpoint is the last
    update's.
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


@dataclass(frozen=True)
class Trial:
    """One configuration that is tried.

    Attributes:
        number: From 1, in the order of the grid.
        values: What varies: {key: value}.
        branch: With the recipe as a trial within the budget.
        updates, supervised, tokens: What its trial will consist of.
        data_run: The run id under which its data artifacts are found.
        validation_rows: Digest of the rows it is judged on: the same tokens, supervised alike.
        blocked: Why its data cannot be trained on; None where it can.
    """

    number: int
    values: dict[str, Any]
    branch: Branch
    updates: int = 0
    supervised: int = 0
    tokens: int = 0
    data_run: str = ""
    validation_rows: str = ""
    blocked: str | None = None

    @property
    def label(self) -> str:
        return label_of(self.values)


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep will do.

    Attributes:
        name: The same for the same trials, data and budget, so that a sweep that was stopped is found again.
        branch: With the recipe that is common to all trials.
        planned_updates: Of the recipe's own plan, of which the budget is a part.
        run_id: Begins the names of the refs that the sweep works with.
    """

    name: str
    branch: Branch
    budget: SweepBudget
    planned_updates: int
    trials: tuple[Trial, ...]
    store: Store
    run_id: str

    def seconds(self) -> float | None:
        """A very rough forecast of all trainings on this machine's CPUs; None on a GPU."""
        if accelerator() is not None:
            return None
        total = 0.0
        for trial in self.trials:
            recipe = trial.branch.require_recipe()
            parameters = estimate(recipe.model, recipe.training, tokens=1).parameters
            total += training_seconds(parameters, trial.tokens)
        return total


@contextmanager
def planned(
    catalog: Catalog,
    branch: Branch,
    recipe: str,
    grid: Grid,
    updates: int | None,
    store: Store,
    report: Reporter,
) -> Iterator[SweepPlan]:
    """The plan of a sweep, for as long as the context lasts.

    Data artifacts are built where they are missing; no ref of the store moves, and those that the sweep works
    with are removed at its end.

    Args:
        branch: With the options that are common to all trials.
        recipe: As it was named on the command line.
        updates: Of the recipe's own plan; None for a share of it.

    Raises:
        InputError: A key, a value or the data is bad; nothing was trained.
        BlockedError: The recipe's own data failed a blocking check.
    """
    recipes = [find_recipe(catalog, recipe, (*grid.common, *options)) for options in grid.trials()]
    data = _Data(store, report, f"sweep-{uuid.uuid4().hex}")
    try:
        with store.using() as use:
            with use.steady():
                use.add(runs=[data.run_id])
            own, _ = data.of(branch)
            plan = PlannedUpdates.read(own["packed_shards"])
            budget = budget_of(plan, branch.require_recipe().training.max_steps, updates)
            trials = tuple(
                _planned_trial(
                    number, values_of(options), Branch(branch.dataset, branch.snapshot, found), budget, data
                )
                for number, (options, found) in enumerate(zip(grid.trials(), recipes), 1)
            )
            yield SweepPlan(
                f"{branch.require_recipe().name}-{_digest(branch, trials)}",
                branch,
                budget,
                len(plan),
                trials,
                store,
                data.run_id,
            )
    finally:
        for folder in (store.refs / ".runs").glob(f"{data.run_id}*"):
            remove_tree(folder)


class _Data:
    """The data artifacts of each trial; trials with the same data configuration share them."""

    def __init__(self, store: Store, report: Reporter, run_id: str) -> None:
        self.store, self.report, self.run_id = store, report, run_id
        self._done: dict[str, tuple[dict[str, Artifact], str] | BlockedError] = {}

    def of(self, branch: Branch) -> tuple[dict[str, Artifact], str]:
        """({stage: artifact} up to packed_shards, the run id that names them)."""
        configs = [
            TRIAL_STAGES[name].config(branch).model_dump(mode="json", by_alias=True) for name in DATA_CONFIGS
        ]
        key = sha256_json(configs)
        if key not in self._done:
            run_id = f"{self.run_id}-data-{len(self._done)}"
            run = Run(self.store, self.report, run_id=run_id, current=False)
            try:
                outcomes = run_until("packed_shards", TRIAL_STAGES, branch, run)
                self._done[key] = {name: o.artifact for name, o in outcomes.items()}, run_id
            except BlockedError as error:
                self._done[key] = error
        found = self._done[key]
        if isinstance(found, BlockedError):
            raise found
        return found


def _planned_trial(
    number: int, values: dict[str, Any], branch: Branch, budget: SweepBudget, data: _Data
) -> Trial:
    try:
        artifacts, data_run = data.of(branch)
    except BlockedError as error:
        return Trial(number, values, branch, blocked=str(error))
    except InputError as error:
        raise InputError(f"trial {number} ({label_of(values)}): {error}") from error
    files = artifacts["tokenized_rows"].manifest.files
    validation = {f.path: f.sha256 for f in files if f.path.startswith("validation/")}
    plan = PlannedUpdates.read(artifacts["packed_shards"])
    updates = updates_within(plan, budget)
    trial = Branch(branch.dataset, branch.snapshot, within_budget(branch.require_recipe(), updates))
    return Trial(
        number,
        values,
        trial,
        updates,
        int(plan.supervised[:updates].sum()),
        int(plan.tokens[:updates].sum()),
        data_run,
        sha256_json(validation),
    )


def _digest(branch: Branch, trials: tuple[Trial, ...]) -> str:
    recipes = [t.branch.require_recipe().model_dump(mode="json", by_alias=True) for t in trials]
    return sha256_json([branch.dataset.name, branch.snapshot, recipes])[:8]

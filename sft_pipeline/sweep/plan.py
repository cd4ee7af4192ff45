"""All points of a sweep with their data and their budgets, before anything is trained."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sft_pipeline.config.load import Catalog, find_recipe
from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.environment import accelerator
from sft_pipeline.stages.run import Run, run_until
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import remove_tree, sha256_json
from sft_pipeline.sweep.budget import Budget, PlannedUpdates, budget_of, updates_within, within_budget
from sft_pipeline.sweep.grid import Grid, label_of, values_of
from sft_pipeline.sweep.stages import TRIAL_STAGES
from sft_pipeline.training.flops import training_seconds
from sft_pipeline.training.memory import estimate

DATA_CONFIGS = ("tokenized_rows", "packed_shards")


@dataclass(frozen=True)
class Point:
    """One configuration that is tried.

    Attributes:
        number: From 1, in the order of the grid.
        values: What varies: {key: value}.
        branch: With the recipe as a trial within the budget.
        updates, supervised, tokens: What its trial will consist of.
        data_run: The run id under which its data artifacts are found.
        validation_rows: Digest of the rows it is judged on.
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
        name: The same for the same points, data and budget, so that a sweep that was stopped is found again.
        branch: With the recipe that is common to all points.
        planned_updates: Of the recipe's own plan, of which the budget is a part.
        run_id: Begins the names of the refs that the sweep works with.
    """

    name: str
    branch: Branch
    budget: Budget
    planned_updates: int
    points: tuple[Point, ...]
    store: Store
    run_id: str

    def seconds(self) -> float | None:
        """A very rough forecast of all trainings on this machine's CPUs; None on a GPU."""
        if accelerator() is not None:
            return None
        total = 0.0
        for point in self.points:
            recipe = point.branch.require_recipe()
            parameters = estimate(recipe.model, recipe.training, tokens=1).parameters
            total += training_seconds(parameters, point.tokens)
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
    """The plan of a sweep, for as long as the context lasts. Data artifacts are built where they are missing; no ref
    of the store moves, and those that the sweep works with are removed at its end.

    Args:
        branch: With the options that are common to all points.
        recipe: As it was named on the command line.
        updates: Of the recipe's own plan; None for a share of it.

    Raises:
        InputError: A key, a value or the data is bad; nothing was trained.
        BlockedError: The recipe's own data failed a blocking check.
    """
    recipes = [find_recipe(catalog, recipe, (*grid.common, *options)) for options in grid.points()]
    data = _Data(store, report, f"sweep-{uuid.uuid4().hex}")
    try:
        own, _ = data.of(branch)
        plan = PlannedUpdates.read(own["packed_shards"])
        budget = budget_of(plan, branch.require_recipe().training.max_steps, updates)
        points = tuple(
            _point(number, values_of(options), Branch(branch.dataset, branch.snapshot, found), budget, data)
            for number, (options, found) in enumerate(zip(grid.points(), recipes), 1)
        )
        yield SweepPlan(
            f"{branch.require_recipe().name}-{_digest(branch, points)}",
            branch,
            budget,
            len(plan),
            points,
            store,
            data.run_id,
        )
    finally:
        for folder in (store.refs / ".runs").glob(f"{data.run_id}*"):
            remove_tree(folder)


class _Data:
    """The data artifacts of each point; points that share their data configuration share one look at them."""

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


def _point(number: int, values: dict[str, Any], branch: Branch, budget: Budget, data: _Data) -> Point:
    try:
        artifacts, data_run = data.of(branch)
    except BlockedError as error:
        return Point(number, values, branch, blocked=str(error))
    except InputError as error:
        raise InputError(f"point {number} ({label_of(values)}): {error}") from error
    plan = PlannedUpdates.read(artifacts["packed_shards"])
    updates = updates_within(plan, budget)
    trial = Branch(branch.dataset, branch.snapshot, within_budget(branch.require_recipe(), updates))
    return Point(
        number,
        values,
        trial,
        updates,
        int(plan.supervised[:updates].sum()),
        int(plan.tokens[:updates].sum()),
        data_run,
        _rows_digest(artifacts["tokenized_rows"]),
    )


def _rows_digest(tokenized: Artifact) -> str:
    """Of the validation rows as they are judged: the same tokens, supervised alike."""
    return sha256_json(
        {f.path: f.sha256 for f in tokenized.manifest.files if f.path.startswith("validation/")}
    )


def _digest(branch: Branch, points: tuple[Point, ...]) -> str:
    recipes = [p.branch.require_recipe().model_dump(mode="json", by_alias=True) for p in points]
    return sha256_json([branch.dataset.name, branch.snapshot, recipes])[:8]

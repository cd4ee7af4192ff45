"""`sft sweep`: the plan of a sweep, its progress, and its table."""

import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sft_pipeline.cli.branch import find_branch
from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.launch.launcher import run_isolated
from sft_pipeline.stages.run import Isolate
from sft_pipeline.store import Store
from sft_pipeline.sweep.grid import as_text, parse_grid, recipe_lines, short_names
from sft_pipeline.sweep.plan import EVALUATIONS, TOLERANCE, SweepPlan, Trial, off_budget, planned
from sft_pipeline.sweep.run import Sweep, run_sweep
from sft_pipeline.sweep.stages import JUDGED_ROWS
from sft_pipeline.sweep.trial import TrialResult


def sweep_recipe(
    recipe: str, *, options: Sequence[str], snapshot: str | None, updates: int | None, console: Console
) -> Sweep:
    """Plans a sweep, says what it will do, and does it.

    Raises:
        InputError: A key, a value or the data is bad; nothing was trained.
        BlockedError: The recipe's own data failed a blocking check.
    """
    grid = parse_grid(options)
    catalog, branch = find_branch(recipe, snapshot, grid.common, console)
    store = Store()
    store.sweep()
    with ConsoleReporter(console) as reporter:
        with planned(catalog, branch, recipe, grid, updates, store, reporter) as plan:
            show_plan(plan, console)
            return run_sweep(plan, reporter, _isolate)


def _isolate(trial: Trial) -> Isolate:
    """Every stage of a trial in a supervised child, as in a run of the branch."""
    processes = trial.branch.require_recipe().training.processes
    return lambda stage, build: run_isolated(
        stage, build, processes=processes if stage.name == "trial_training" else 1
    )


def show_plan(plan: SweepPlan, console: Console) -> None:
    """What will be trained, before it is."""
    recipe, budget = plan.branch.require_recipe(), plan.budget
    names = short_names(list(plan.trials[0].values))
    title = f"sweep {plan.name} on {plan.branch.dataset.name} {plan.branch.snapshot}"
    table = Table(title=title)
    for column in ("trial", *names.values(), "updates", "supervised tokens"):
        table.add_column(column, justify="right")
    for trial in plan.trials:
        table.add_row(
            str(trial.number),
            *(as_text(v) for v in trial.values.values()),
            f"{trial.updates:,}",
            "blocked" if trial.blocked else f"{trial.supervised:,} {_off(trial.supervised, plan)}".strip(),
        )
    console.print(table)
    for trial in plan.trials:
        if trial.blocked:
            console.print(f"trial {trial.number} is blocked: {trial.blocked}", soft_wrap=True)
    seconds = plan.seconds()
    time = (
        "the time is measured as it goes"
        if seconds is None
        else f"about {seconds:,.0f} s of training on {os.cpu_count()} CPUs, very roughly; "
        "loading and judging not counted"
    )
    rows = min(JUDGED_ROWS, recipe.evaluation.max_rows or JUDGED_ROWS)
    for line in (
        f"budget: {budget.supervised:,} supervised tokens each, as in {budget.updates:,} of the recipe's "
        f"{plan.planned_updates:,} updates; {time}",
        f"each schedule ({recipe.training.schedule}) is complete within its own updates; "
        f"{EVALUATIONS} evaluations, early stopping off",
        f"judged on the validation split: the loss of all rows, replies to {rows} of them at most; "
        "the test split is not read",
    ):
        console.print(line, soft_wrap=True)


def show_sweep(sweep: Sweep, console: Console) -> None:
    """The ranked table, what to paste into the recipe, and where to look."""
    rule = sweep.plan.branch.require_recipe().evaluation
    names = short_names(list(sweep.plan.trials[0].values))
    graders = [g.name for g in rule.graders]
    table = Table(title=f"{sweep.plan.name}: ranked by {', '.join([*rule.gates, *rule.rank_by])}")
    for column in (
        "rank",
        *names.values(),
        "val_loss",
        *graders,
        "supervised tokens",
        "tokens/s",
        "trained for",
    ):
        table.add_column(column, justify="right")
    table.add_column("verdict", max_width=60)
    for result, rank in sweep.ranked():
        table.add_row(
            str(rank.number),
            *(as_text(v) for v in result.trial.values.values()),
            *(_number(result.end.scores.get(name)) for name in ("val_loss", *graders)),
            *_spent(result, sweep.plan),
            rank.verdict.partition("\n")[0],
        )
    console.print(table)
    if not sweep.comparable_losses():
        console.print(
            "the trials were judged on different validation tokens (the template, the tokenizer or tokens.* "
            "varies): their val_loss cannot be compared, their graders can",
            style="yellow",
            soft_wrap=True,
        )
    _show_best(sweep, console)
    console.print(f"status: {sweep.status}")
    if sweep.error:
        console.print(sweep.error, style="red", soft_wrap=True)
    console.print(f"plots and table: {sweep.folder}", soft_wrap=True)
    console.print("curves side by side: sft ui (MLflow, the sweep's run and those nested below it)")


def _show_best(sweep: Sweep, console: Console) -> None:
    best = sweep.best()
    if best is None:
        return
    passed = sweep.ranks()[best.trial.number].gates_passed
    console.print(
        "best, for the recipe:"
        if passed
        else "no trial passes the gates within this budget; the best of them:"
    )
    for line in recipe_lines(best.trial.values):
        console.print(f"  {line}", style="green", soft_wrap=True)


def _spent(result: TrialResult, plan: SweepPlan) -> tuple[str, str, str]:
    if not result.supervised:
        return "–", "–", "–"
    tokens = f"{result.supervised:,} {_off(result.supervised, plan)}".strip()
    if not result.seconds:
        return tokens, "–", "–"
    return tokens, f"{result.tokens / result.seconds:,.0f}", f"{result.seconds:,.1f} s"


def _off(supervised: int, plan: SweepPlan) -> str:
    """A mark where a trial is off the common budget by more than a few percent."""
    off = off_budget(supervised, plan.budget)
    return f"({off:+.1%})" if abs(off) > TOLERANCE else ""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"

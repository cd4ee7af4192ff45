"""Runs the trials of a sweep one after the other, and ranks them.

Every trial goes through the ordinary stage engine, so what is there already (the data stages of all trials,
and the trials that a stopped sweep had finished) is reused by fingerprint. A trial that was killed begins
anew: it is short, and its only checkpoint is the last update's. Refs and the champion alias do not move.

A sweep is no Dagster run. Its trials are not materializations of the branch's assets: in Dagster's event log
the latest materialization of `trained_checkpoints` is the recipe's training, and a trial in that place would
be taken for it. What a sweep shows, curves side by side and a table, is what nested MLflow runs are made for.
The pool that lets Dagster start one training at a time does not see a sweep: on a machine whose GPU is busy
with a run, wait for it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.errors import Interrupted
from sft_pipeline.plots.sweep import plot_curves, plot_ranking
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.run import Isolate
from sft_pipeline.store.files import write_json
from sft_pipeline.sweep.grid import recipe_lines
from sft_pipeline.sweep.plan import TOLERANCE, SweepPlan, Trial
from sft_pipeline.sweep.ranking import JUDGED, Rank, outcome, ranks_of
from sft_pipeline.sweep.trial import TrialResult, run_trial, summary
from sft_pipeline.tracking.sweep import SweepTracker


@dataclass
class Sweep:
    """A sweep and what came of it so far.

    Attributes:
        status: running, done, blocked, failed or interrupted.
    """

    plan: SweepPlan
    results: dict[int, TrialResult]
    mlflow_run_id: str | None = None
    status: str = "running"
    exit_code: int = 0
    error: str | None = None

    @property
    def folder(self) -> Path:
        return self.plan.store.home / "sweeps" / self.plan.name

    def ranks(self) -> dict[int, Rank]:
        rule = self.plan.branch.require_recipe().evaluation
        return ranks_of({number: r.end for number, r in self.results.items()}, rule)

    def ranked(self) -> list[tuple[TrialResult, Rank]]:
        """The best first."""
        found = self.ranks()
        return sorted(((r, found[n]) for n, r in self.results.items()), key=lambda x: x[1].number)

    def best(self) -> TrialResult | None:
        """The first in rank, whether or not any trial passes the gates; None where none was judged."""
        first = self.ranked()[0][0]
        return first if first.end.status == JUDGED else None

    def comparable_losses(self) -> bool:
        """Whether all trials were judged on the same tokens; if not, their val_loss cannot be compared."""
        return len({r.trial.validation_rows for r in self.results.values() if not r.trial.blocked}) <= 1

    def to_json(self) -> dict[str, Any]:
        plan, found, best = self.plan, self.ranks(), self.best()
        rule = plan.branch.require_recipe().evaluation
        return {
            "status": self.status,
            "name": plan.name,
            "recipe": plan.branch.require_recipe().name,
            "dataset": plan.branch.dataset.name,
            "snapshot": plan.branch.snapshot,
            "budget": {
                "supervised_tokens": plan.budget.supervised,
                "updates": plan.budget.updates,
                "planned_updates": plan.planned_updates,
                "tolerance": TOLERANCE,
                "schedule": "each trial's warm-up and decay are complete within its own updates",
            },
            "gates": list(rule.gates),
            "rank_by": list(rule.rank_by),
            "comparable_losses": self.comparable_losses(),
            "points": [r.to_json(plan, found[n]) for n, r in self.results.items()],
            "best": best
            and {
                "point": best.trial.number,
                "values": best.trial.values,
                "metrics": dict(best.end.scores),
                "gates_passed": found[best.trial.number].gates_passed,
                "recipe_lines": recipe_lines(best.trial.values),
            },
            "mlflow_run_id": self.mlflow_run_id,
            "folder": str(self.folder),
            "error": self.error,
        }


def run_sweep(plan: SweepPlan, report: Reporter, isolate: Callable[[Trial], Isolate | None]) -> Sweep:
    """Trains and judges every trial, whatever becomes of the others, and writes `$SFT_HOME/sweeps/<name>/`.

    Args:
        isolate: For a trial, what runs a stage in a child process; None runs it here.
    """
    sweep = Sweep(plan, {p.number: TrialResult(p) for p in plan.trials})
    with SweepTracker(plan.name, plan.branch, report) as tracker:
        sweep.mlflow_run_id = tracker.run_id
        tracker.describe(sweep.to_json())
        write_json(sweep.folder / "sweep.json", sweep.to_json())
        pace = _Pace(plan.trials)
        try:
            for trial in plan.trials:
                report.log(f"trial {trial.number} of {len(plan.trials)}: {trial.label}")
                sweep.results[trial.number] = result = run_trial(trial, plan, tracker, report, isolate(trial))
                write_json(sweep.folder / "sweep.json", sweep.to_json())
                report.log(f"trial {trial.number}: {summary(result)}{pace.after(result)}")
            sweep.status, sweep.exit_code = outcome([r.end for r in sweep.results.values()])
        except (KeyboardInterrupt, Interrupted):
            sweep.status, sweep.exit_code = "interrupted", Interrupted.exit_code
            sweep.error = "interrupted; run the same command again to go on"
        if sweep.status in ("blocked", "failed"):
            sweep.error = "; ".join(f"trial {r.trial.number}: {rank.verdict}" for r, rank in sweep.ranked())
        _finish(sweep, tracker)
    return sweep


class _Pace:
    """How long the trials that are left will take, from those that were made here: training and judging."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._left = sum(p.tokens for p in trials)
        self._seconds, self._tokens, self._since = 0.0, 0, time.monotonic()

    def after(self, result: TrialResult) -> str:
        now = time.monotonic()
        self._left -= result.trial.tokens
        if not result.cached:
            self._seconds += now - self._since
            self._tokens += result.trial.tokens
        self._since = now
        if not self._left or not self._tokens:
            return ""
        return f"; about {self._left * self._seconds / self._tokens:,.0f} s to go"


def _finish(sweep: Sweep, tracker: SweepTracker) -> None:
    """The plots and the table, here and in the tracking run."""
    best = sweep.best()
    plot_curves(sweep.folder / "curves.png", [r for r, _ in sweep.ranked()])
    if best:
        plot_ranking(
            sweep.folder / "ranking.png",
            sweep.ranked(),
            sweep.plan.branch.require_recipe().evaluation.rank_by,
        )
    write_json(sweep.folder / "sweep.json", sweep.to_json())
    ranks = {r.mlflow_run_id: rank.number for r, rank in sweep.ranked() if r.mlflow_run_id}
    tracker.finish(sweep.status, sweep.folder, ranks, best.end.scores if best else {})

"""Runs a stage and everything it needs, in this process."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sft_pipeline.errors import BlockedError
from sft_pipeline.reporting import Reporter, Tee
from sft_pipeline.stages import standby
from sft_pipeline.stages.run import (
    Outcome,
    Run,
    earlier_builds,
    failed_blocking,
    load_function,
    needed_for,
    run_stage,
)
from sft_pipeline.stages.stage import Branch, Stage
from sft_pipeline.store import Store


def run_until(last: str, stages: Mapping[str, Stage], branch: Branch, run: Run) -> dict[str, Outcome]:
    """Brings a stage and its ancestors up to date, in order.

    Raises:
        BlockedError: A blocking check failed on the way.
        InputError: Bad data or configuration.
    """
    outcomes = {}
    names = needed_for(last, stages)
    ahead = Ahead([stages[name] for name in names], branch, run.store)
    run = replace(run, report=Tee(run.report, ahead))
    try:
        for name in names:
            outcomes[name] = run_stage(stages[name], stages, branch, run)
            failed = failed_blocking([outcomes[name].artifact])
            if failed:
                raise BlockedError("; ".join(failed))
    finally:
        standby.end_all()
    return outcomes


class Ahead(Reporter):
    """Listens to a run, and starts what later stages will want at hand as soon as an earlier one had to be built.

    Args:
        stages: Of the run, in order.
    """

    def __init__(self, stages: Sequence[Stage], branch: Branch, store: Store) -> None:
        self._stages, self._branch, self._store = list(stages), branch, store

    def stage(self, asset: str, state: str) -> None:
        if state != "built":
            return
        names = [stage.name for stage in self._stages]
        for stage in self._stages[names.index(asset.rpartition("/")[2]) + 1 :]:
            if stage.ahead:
                start = load_function(stage.ahead)
                start(stage.config(self._branch), earlier_builds(stage, self._store, self._branch))

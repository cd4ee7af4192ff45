"""A sweep in MLflow: one parent run, and below it one run for each trial.

Runs are found again by what they are, so that a sweep that was stopped goes on in the same runs.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sft_pipeline.reporting import Reporter, Tee
from sft_pipeline.stages.run import Tracked, Tracker
from sft_pipeline.stages.stage import Branch, Stage
from sft_pipeline.store import Artifact
from sft_pipeline.tracking.curves import MlflowReporter, copy_curves, read_curves
from sft_pipeline.tracking.mlflow import DESCRIBED, log_artifact, log_params, open_run
from sft_pipeline.tracking.names import accepted_name, flatten
from sft_pipeline.tracking.server import GuardedClient, TrackedRun

SWEEP_TAG = "sft.sweep"
TRIAL_TAG = "sft.trial_fingerprint"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its UI nests by it
STATUS = {"done": "FINISHED", "interrupted": "KILLED"}
TRIAL_STATUS = {"judged": "FINISHED"}


class SweepTracker:
    """The parent run of a sweep, open while in its context. Without MLflow a sweep runs all the same.

    Args:
        report: Told once where MLflow does not record something.
    """

    def __init__(self, name: str, branch: Branch, report: Reporter) -> None:
        self._client = GuardedClient(report, "The sweep goes on; its table is in its own folder too")
        self._name = name
        self._ended = False
        identity = {SWEEP_TAG: name, "sft.sweep_role": "parent"}
        self._parent = TrackedRun(
            self._client, lambda client: open_run(client, branch, f"sweep {name}", identity)
        )
        self._parent.attempt(lambda client, run_id: None)

    @property
    def run_id(self) -> str | None:
        """The parent run's; None where MLflow has not made it."""
        return self._parent.run_id

    def __enter__(self) -> "SweepTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            status = "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
            self._parent.attempt(lambda client, run_id: client.set_terminated(run_id, status))

    def describe(self, sweep: Mapping[str, Any]) -> None:
        """What varies, the budget and the rule, as parameters."""
        varied: dict[str, list[str]] = {}
        for trial in sweep["points"]:
            for key, value in trial["values"].items():
                if str(value) not in varied.setdefault(key, []):
                    varied[key].append(str(value))
        params = {f"varied.{key}": ", ".join(values) for key, values in varied.items()} | {
            "points": str(len(sweep["points"])),
            "budget.supervised_tokens": str(sweep["budget"]["supervised_tokens"]),
            "gates": ", ".join(sweep["gates"]),
            "rank_by": ", ".join(sweep["rank_by"]),
        }
        self._parent.attempt(lambda client, run_id: log_params(client, run_id, params))

    # -- one trial ---------------------------------------------------------------------------------

    def of(self, label: str) -> Tracker:
        """The engine's tracker for one trial: its training and its judgement report to one child run."""

        @contextlib.contextmanager
        def track(
            stage: Stage, branch: Branch, fingerprint: str, inputs: Mapping[str, Artifact], report: Reporter
        ) -> Iterator[Tracked]:
            if stage.name not in ("trial_training", "trial_judgement"):
                yield Tracked(None, report)
                return
            trains = stage.name == "trial_training"
            training = fingerprint if trains else inputs["trial_training"].manifest.fingerprint
            child = self._child(label, branch, training)
            listener = MlflowReporter(child, resumes=trains)

            def committed(artifact: Artifact) -> None:
                child.attempt(lambda client, run_id: log_artifact(client, run_id, artifact))

            try:
                yield Tracked(child.run_id, Tee(report, listener), committed=committed)
            except BaseException as error:
                status = "FAILED" if isinstance(error, Exception) else "KILLED"
                child.attempt(lambda client, run_id: client.set_terminated(run_id, status))
                raise
            finally:
                listener.flush()

        return track

    def _child(self, label: str, branch: Branch, training: str) -> TrackedRun:
        """The run of the trial whose training has this fingerprint."""

        def opening(client: Any) -> tuple[str, str]:
            identity = {SWEEP_TAG: self._name, TRIAL_TAG: training, PARENT_TAG: self._parent.opened(client)}
            return open_run(client, branch, label, identity)

        recipe = flatten(branch.require_recipe().model_dump(mode="json", include=set(DESCRIBED)))
        child = TrackedRun(self._client, opening)
        child.attempt(lambda client, run_id: log_params(client, run_id, recipe))
        return child

    def child_of(self, label: str, branch: Branch, trained: Artifact) -> str | None:
        """The id of a trial's run, which also gets the curves of a training that another sweep had made."""
        child = self._child(label, branch, trained.manifest.fingerprint)
        curves, trained_in = read_curves(trained), trained.manifest.mlflow_run_id

        def copying(client: Any, run_id: str) -> None:
            copy_curves(client, run_id, curves)
            if trained_in not in (None, run_id):
                client.set_tag(run_id, "sft.trained_in", trained_in)

        child.attempt(copying)
        return child.run_id

    def ended(
        self, run_id: str | None, status: str, scores: Mapping[str, float | None], supervised: int
    ) -> None:
        """A trial's result. None where it never came to a run of its own."""
        if run_id is None:
            return

        def telling(client: Any) -> None:
            for name, value in scores.items():
                if value is not None:
                    client.log_metric(run_id, accepted_name(f"validation/{name}"), value)
            client.log_metric(run_id, "supervised_tokens_trained", supervised)
            client.set_tag(run_id, "sft.trial_status", status)
            client.set_terminated(run_id, TRIAL_STATUS.get(status, "FAILED"))

        self._client.attempt(telling)

    # -- the whole ---------------------------------------------------------------------------------

    def finish(
        self, status: str, folder: Path, ranks: Mapping[str, int], best: Mapping[str, float | None]
    ) -> None:
        """The ranks, the best trial's scores, and the sweep's files."""

        def telling(client: Any, parent: str) -> None:
            for run_id, rank in ranks.items():
                client.log_metric(run_id, "rank", rank)
            for name, value in best.items():
                if value is not None:
                    client.log_metric(parent, accepted_name(f"best/{name}"), value)
            for path in sorted(folder.iterdir()):
                if path.suffix in (".json", ".png") and not path.name.startswith("."):
                    client.log_artifact(parent, str(path))

        self._parent.attempt(telling)
        self._parent.attempt(
            lambda client, run_id: client.set_terminated(run_id, STATUS.get(status, "FAILED"))
        )
        self._ended = True

"""A sweep in MLflow: one parent run, and below it one run for each trial.

Runs are found again by what they are, so that a sweep that was stopped goes on in the same runs.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow.parquet as pq

from sft_pipeline.reporting import Reporter, Tee
from sft_pipeline.stages.run import Tracked, Tracker
from sft_pipeline.stages.stage import Branch, Stage
from sft_pipeline.store import Artifact
from sft_pipeline.tracking.mlflow import (
    DESCRIBED,
    MlflowReporter,
    connect,
    flatten,
    log_artifact,
    log_metrics,
    log_params,
    open_run,
)

SWEEP_TAG = "sft.sweep"
TRIAL_TAG = "sft.trial_fingerprint"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its UI nests by it
STATUS = {"done": "FINISHED", "interrupted": "KILLED"}
TRIAL_STATUS = {"judged": "FINISHED"}


class SweepTracker:
    """The parent run of a sweep, open while in its context.

    Raises:
        InputError: MLflow does not answer.
    """

    def __init__(self, name: str, branch: Branch) -> None:
        self._client = connect()
        self._name = name
        self._ended = False
        identity = {SWEEP_TAG: name, "sft.sweep_role": "parent"}
        _, self.run_id = open_run(self._client, branch, f"sweep {name}", identity)

    def __enter__(self) -> "SweepTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self._client.set_terminated(
                self.run_id, "FAILED" if kind and issubclass(kind, Exception) else "KILLED"
            )

    def describe(self, sweep: Mapping[str, Any]) -> None:
        """What varies, the budget and the rule, as parameters."""
        varied: dict[str, list[str]] = {}
        for trial in sweep["points"]:
            for key, value in trial["values"].items():
                if str(value) not in varied.setdefault(key, []):
                    varied[key].append(str(value))
        log_params(
            self._client,
            self.run_id,
            {f"varied.{key}": ", ".join(values) for key, values in varied.items()}
            | {
                "points": str(len(sweep["points"])),
                "budget.supervised_tokens": str(sweep["budget"]["supervised_tokens"]),
                "gates": ", ".join(sweep["gates"]),
                "rank_by": ", ".join(sweep["rank_by"]),
            },
        )

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
            run_id = self.child(
                label, branch, fingerprint if trains else inputs["trial_training"].manifest.fingerprint
            )
            listener = MlflowReporter(self._client, run_id, report, resumes=trains)
            try:
                yield Tracked(
                    run_id,
                    Tee(report, listener),
                    committed=lambda artifact: log_artifact(self._client, run_id, artifact),
                )
            except BaseException as error:
                self._client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
                raise
            finally:
                listener.flush()

        return track

    def child(self, label: str, branch: Branch, training: str) -> str:
        """The run of the trial whose training has this fingerprint."""
        identity = {SWEEP_TAG: self._name, TRIAL_TAG: training, PARENT_TAG: self.run_id}
        _, run_id = open_run(self._client, branch, label, identity)
        recipe = branch.require_recipe().model_dump(mode="json", include=set(DESCRIBED))
        log_params(self._client, run_id, flatten(recipe))
        return run_id

    def copy_curves(self, run_id: str, trained: Artifact) -> None:
        """The curves of a training that another sweep had made, so that every trial's run has its own."""
        from mlflow.entities import Metric

        if self._client.get_metric_history(run_id, "loss"):
            return
        rows = pq.read_table(trained.file("history.parquet")).to_pylist()
        now = int(time.time() * 1000)
        points = [Metric(r["name"], r["value"], now, r["step"]) for r in rows]
        log_metrics(self._client, run_id, points)
        if trained.manifest.mlflow_run_id not in (None, run_id):
            self._client.set_tag(run_id, "sft.trained_in", trained.manifest.mlflow_run_id)

    def ended(
        self, run_id: str | None, status: str, scores: Mapping[str, float | None], supervised: int
    ) -> None:
        """A trial's result. None where it never came to a run of its own."""
        if run_id is None:
            return
        for name, value in scores.items():
            if value is not None:
                self._client.log_metric(run_id, f"validation/{name}", value)
        self._client.log_metric(run_id, "supervised_tokens_trained", supervised)
        self._client.set_tag(run_id, "sft.point", status)
        self._client.set_terminated(run_id, TRIAL_STATUS.get(status, "FAILED"))

    # -- the whole ---------------------------------------------------------------------------------

    def finish(
        self, status: str, folder: Path, ranks: Mapping[str, int], best: Mapping[str, float | None]
    ) -> None:
        """The ranks, the best trial's scores, and the sweep's files."""
        for run_id, rank in ranks.items():
            self._client.log_metric(run_id, "rank", rank)
        for name, value in best.items():
            if value is not None:
                self._client.log_metric(self.run_id, f"best/{name}", value)
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".png") and not path.name.startswith("."):
                self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, STATUS.get(status, "FAILED"))
        self._ended = True

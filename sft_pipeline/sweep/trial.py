"""One trial of a sweep: probe, training, judgement, and what became of it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sft_pipeline.errors import BlockedError, InputError, Interrupted, SftError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.run import Isolate, Run, run_stage
from sft_pipeline.store import Artifact
from sft_pipeline.sweep.plan import SweepPlan, Trial, off_budget
from sft_pipeline.sweep.ranking import BAD_INPUT, BLOCKED, DIVERGED, FAILED, JUDGED, PENDING, Rank, TrialEnd
from sft_pipeline.sweep.stages import TRIAL_STAGES
from sft_pipeline.tracking.sweep import SweepTracker


@dataclass
class TrialResult:
    """What is known of one trial.

    Attributes:
        loss: (supervised tokens so far, training loss) of each update; val_loss likewise at each evaluation.
        seconds: Of training.
    """

    trial: Trial
    end: TrialEnd = field(default_factory=lambda: TrialEnd(PENDING, {}))
    supervised: int = 0
    tokens: int = 0
    updates: int = 0
    seconds: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    cached: bool = False
    mlflow_run_id: str | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    loss: list[tuple[int, float]] = field(default_factory=list)
    val_loss: list[tuple[int, float]] = field(default_factory=list)

    def to_json(self, plan: SweepPlan, rank: Rank) -> dict[str, Any]:
        off = off_budget(self.supervised, plan.budget) if self.supervised else None
        return {
            "point": self.trial.number,
            "values": self.trial.values,
            "status": self.end.status,
            "rank": rank.number,
            "gates_passed": rank.gates_passed,
            "verdict": rank.verdict,
            "metrics": dict(self.end.scores),
            "updates": self.updates,
            "planned_updates": self.trial.updates,
            "supervised_tokens": self.supervised,
            "planned_supervised_tokens": self.trial.supervised,
            "off_budget": None if off is None else round(off, 5),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": round(self.tokens / self.seconds, 1) if self.seconds else None,
            "validation_rows": self.rows,
            "cached": self.cached,
            "mlflow_run_id": self.mlflow_run_id,
            "artifacts": self.artifacts,
        }


def run_trial(
    trial: Trial, plan: SweepPlan, tracker: SweepTracker, report: Reporter, isolate: Isolate | None
) -> TrialResult:
    """One trial; what goes wrong with it is its result."""
    result = TrialResult(trial)
    try:
        if trial.blocked:
            raise BlockedError(trial.blocked)
        _trial(result, plan, tracker, report, isolate)
    except Interrupted:
        raise
    except SftError as error:
        status = {BlockedError: BLOCKED, InputError: BAD_INPUT}.get(type(error), FAILED)
        result.end = TrialEnd(status, {}, str(error))
    if result.end.status != JUDGED:
        report.log(f"{result.end.status}: {result.end.reason}", "warning")
    tracker.ended(result.mlflow_run_id, result.end.status, result.end.scores, result.supervised)
    return result


def _trial(
    result: TrialResult, plan: SweepPlan, tracker: SweepTracker, report: Reporter, isolate: Isolate | None
) -> None:
    """Probe, training, judgement; fills the result in.

    Raises:
        SftError: As the stages raise them; what was found before is in the result.
    """
    trial = result.trial
    run = Run(
        plan.store,
        report,
        run_id=f"{plan.run_id}-{trial.number}",
        earlier_run_ids=(trial.data_run,),
        current=False,
        tracker=tracker.of(trial.label),
        isolate=isolate,
    )
    probe = run_stage(TRIAL_STAGES["trial_probe"], TRIAL_STAGES, trial.branch, run)
    if not probe.artifact.manifest.accepted:
        raise BlockedError(_failed_check(probe.artifact))
    trained = run_stage(TRIAL_STAGES["trial_training"], TRIAL_STAGES, trial.branch, run)
    _read_training(result, trained.artifact)
    result.mlflow_run_id = tracker.child_of(trial.label, trial.branch, trained.artifact)
    if not trained.artifact.manifest.accepted:
        finite = next(c for c in trained.artifact.manifest.checks if c["name"] == "finite_loss")
        if finite["passed"]:
            raise BlockedError(_failed_check(trained.artifact))
        result.end = TrialEnd(DIVERGED, {}, _read_json(trained.artifact, "training.json")["stopped"])
        return
    judged = run_stage(TRIAL_STAGES["trial_judgement"], TRIAL_STAGES, trial.branch, run)
    result.artifacts["trial_judgement"] = str(judged.artifact.path)
    result.cached = trained.cached and judged.cached
    found = _read_json(judged.artifact, "judgement.json")
    result.rows = {"rows": found["rows"], "generated": found["generated"]}
    # A trial whose loss rose can be judged, and its scores will show it.
    findings = _read_json(trained.artifact, "diagnosis.json")["findings"]
    rose = next((f["words"] for f in findings if f["kind"] == "diverging"), "")
    result.end = TrialEnd(JUDGED, found["scores"], rose)


def _read_training(result: TrialResult, trained: Artifact) -> None:
    counts = trained.manifest.counts
    result.supervised, result.tokens = counts["supervised_tokens"], counts["tokens"]
    result.updates = counts["updates"]
    result.artifacts["trial_training"] = str(trained.path)
    result.seconds = (
        round(sum(v for _, v in _curve(trained.file("throughput.parquet"), "seconds")), 2) or None
    )
    history = trained.file("history.parquet")
    spent, total = {0: 0}, 0
    for step, tokens in _curve(history, "supervised_tokens"):
        total += int(tokens)
        spent[step] = total
    result.loss = [(spent[step], value) for step, value in _curve(history, "loss")]
    result.val_loss = [(spent[step], value) for step, value in _curve(history, "val_loss")]


def _curve(path: Path, name: str) -> list[tuple[int, float]]:
    rows = pq.read_table(path, filters=[("name", "=", name)]).to_pylist()
    return [(row["step"], row["value"]) for row in rows]


def _read_json(artifact: Artifact, name: str) -> Any:
    return json.loads(artifact.file(name).read_text(encoding="utf-8"))


def _failed_check(artifact: Artifact) -> str:
    failed = next(c for c in artifact.manifest.checks if c["blocking"] and not c["passed"])
    return f"{failed['name']}: {failed['description']}"


def summary(result: TrialResult) -> str:
    """A trial's scores, or how else it ended, on one line."""
    if result.end.status != JUDGED:
        return result.end.status
    scores = ", ".join(f"{k} {v:.4g}" for k, v in result.end.scores.items() if v is not None)
    return scores + (" (was there already)" if result.cached else "")

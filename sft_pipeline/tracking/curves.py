"""Metrics and samples of a build, sent to an MLflow run in batches, and the curves of a finished artifact."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Artifact
from sft_pipeline.tracking.names import accepted_name
from sft_pipeline.tracking.server import TrackedRun

FLUSH_SECONDS = 2.0
MOST_METRICS = 1000  # that MLflow accepts in one request
CURVES = ("history.parquet", "throughput.parquet")

CurvePoint = tuple[str, float, int, int]  # name, value, milliseconds since 1970, step


class MlflowReporter(Reporter):
    """Logs metrics in batches, and samples of replies.

    Args:
        resumes: The steps go on where an earlier build of the same fingerprint was killed: a point that it
            had logged is not logged twice. Otherwise a later point replaces an earlier one.

    Attributes:
        waiting: Points that are not sent yet.
        waiting_samples: {file in MLflow: text} of samples that are not sent yet.
    """

    def __init__(self, run: TrackedRun, *, resumes: bool) -> None:
        self._run = run
        self._resumes = resumes
        self.waiting: list[CurvePoint] = []
        self.waiting_samples: dict[str, str] = {}
        self._logged_to: dict[str, int] = {}
        self._last_flush = time.monotonic()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.waiting += [(accepted_name(name), float(value), now, step) for name, value in values.items()]
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        text = json.dumps(list(rows), indent=2, ensure_ascii=False)
        self.waiting_samples[f"samples/update-{step:06d}.json"] = text
        self.flush()

    def flush(self) -> None:
        """Sends what is waiting; keeps it for the next time where MLflow does not take it."""
        if self.waiting and self._run.attempt(self._send, retried_later=True):
            self.waiting = []
        if self.waiting_samples and self._run.attempt(self._send_samples, retried_later=True):
            self.waiting_samples = {}
        self._last_flush = time.monotonic()

    def _send(self, client: Any, run_id: str) -> None:
        logged_to, new = dict(self._logged_to), []
        for point in self.waiting:
            name, _, _, step = point
            if self._resumes and name not in logged_to:
                history = client.get_metric_history(run_id, name)
                logged_to[name] = max((m.step for m in history), default=-1)
            if not self._resumes or step > logged_to[name]:
                new.append(point)
                logged_to[name] = step
        log_points(client, run_id, new)
        self._logged_to = logged_to

    def _send_samples(self, client: Any, run_id: str) -> None:
        log_samples(client, run_id, self.waiting_samples)


def log_samples(client: Any, run_id: str, samples: Mapping[str, str]) -> None:
    """Writes {file in MLflow: text}."""
    for name, text in samples.items():
        client.log_text(run_id, text, name)


def log_points(client: Any, run_id: str, points: Sequence[CurvePoint]) -> None:
    """Sends points in requests of the size that MLflow accepts."""
    from mlflow.entities import Metric

    for start in range(0, len(points), MOST_METRICS):
        batch = [Metric(*point) for point in points[start : start + MOST_METRICS]]
        client.log_batch(run_id, metrics=batch)


def read_curves(artifact: Artifact) -> list[dict[str, Any]]:
    """The points of an artifact's curves: name, step and value of each."""
    import pyarrow.parquet as pq

    paths = [artifact.file(name) for name in CURVES]
    return [row for path in paths if path.is_file() for row in pq.read_table(path).to_pylist()]


def fill_curves(client: Any, run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Logs those points of an artifact's curves that MLflow lacks.

    A killed orchestrator takes with it what it had not sent yet, while the checkpoint after those updates may
    be whole, so that they are never made again. Such points get the time of the one before them.

    Args:
        rows: As `read_curves` gives them.
    """
    known = client.get_run(run_id).data.metrics
    missing: list[CurvePoint] = []
    for name in sorted({row["name"] for row in rows if accepted_name(row["name"]) in known}):
        key = accepted_name(name)
        logged = {m.step: m.timestamp for m in client.get_metric_history(run_id, key)}
        now = min(logged.values())
        for row in sorted((r for r in rows if r["name"] == name), key=lambda r: r["step"]):
            now = logged.get(row["step"], now)
            if row["step"] not in logged:
                missing.append((key, row["value"], now, row["step"]))
    log_points(client, run_id, missing)


def copy_curves(client: Any, run_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Logs the curves of a training into a run that has none of it.

    Args:
        rows: As `read_curves` gives them.
    """
    if not client.get_metric_history(run_id, "loss"):
        now = int(time.time() * 1000)
        log_points(client, run_id, [(accepted_name(r["name"]), r["value"], now, r["step"]) for r in rows])

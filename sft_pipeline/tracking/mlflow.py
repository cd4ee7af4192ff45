"""One MLflow run per training, found again by its fingerprint: a retry or a resume goes on in the same run.

The orchestrator owns the run; the training child only writes events, which arrive here through a
Reporter. MLflow is an index. The manifests hold the truth, so a lost metric point is a warning and not a
failed training.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.project import sft_home
from sft_pipeline.reporting import Reporter, Tee
from sft_pipeline.secret_text import public_address, redacted
from sft_pipeline.stages.run import Run, Tracked
from sft_pipeline.stages.stage import Branch, Evidence, Stage
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import write_json
from sft_pipeline.tracking.registry import register

FINGERPRINT_TAG = "sft.training_fingerprint"
FLUSH_SECONDS = 2.0
DAGSTER_PORT, MLFLOW_PORT = 3000, 5000  # of `sft ui`
TRACKED = ("trained_checkpoints", "evaluation", "exported_model")
DESCRIBED = ("model", "template", "tokens", "packing", "training", "dataset")  # parameters of a run
# What MLflow keeps beside manifest and plots: the whole evaluation, and what a registered version points at.
EVALUATION_FILES = ("evaluation.json", "samples.parquet")
EXPORT_FILES = ("README.md", "manifest.json")
MOST_METRICS, LONGEST_PARAM = 1000, 6000  # what MLflow accepts in one request, and characters of a value


class MlflowTracker:
    """Tracks the expensive stages: training, evaluation, export.

    Args:
        dagster_run_id: Linked from the MLflow run.
    """

    def __init__(self, dagster_run_id: str | None) -> None:
        self._dagster_run_id = dagster_run_id

    @contextlib.contextmanager
    def __call__(
        self, stage: Stage, branch: Branch, fingerprint: str, inputs: Mapping[str, Artifact], report: Reporter
    ) -> Iterator[Tracked]:
        if stage.name not in TRACKED:
            yield Tracked(None, report)
            return
        client = connect()
        trains = stage.name == "trained_checkpoints"
        training = fingerprint if trains else inputs["trained_checkpoints"].manifest.fingerprint
        recipe = branch.require_recipe()
        experiment_id, run_id = open_training_run(client, branch, training)
        for name, artifact in inputs.items():
            client.set_tag(run_id, f"sft.input.{name}", artifact.manifest.data_version)
        if self._dagster_run_id:
            client.set_tag(run_id, "sft.dagster_run_id", self._dagster_run_id)
            client.set_tag(run_id, "sft.dagster_run", dagster_run_url(self._dagster_run_id))
        log_params(client, run_id, flatten(recipe.model_dump(mode="json", include=set(DESCRIBED))))
        listener = MlflowReporter(client, run_id, report, resumes=trains)
        url = mlflow_run_url(experiment_id, run_id)

        def committed(artifact: Artifact) -> None:
            listener.flush()
            if stage.name != "exported_model":  # what `publish` logs, also when an earlier run could not
                log_artifact(client, run_id, artifact)
            if trains:
                fill_curves(client, run_id, artifact)
                log_lineage(client, run_id, artifact)
            if stage.name == "evaluation":
                for name in EVALUATION_FILES:
                    client.log_artifact(run_id, str(artifact.file(name)), stage.name)

        status = "KILLED"
        try:
            yield Tracked(run_id, Tee(report, listener), {"mlflow_run": Evidence("url", url)}, committed)
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            listener.flush()
            client.set_terminated(run_id, status)


def publish(artifact: Artifact, branch: Branch, run: Run) -> None:
    """Registers an accepted export, built or reused, and lets it compete for the champion alias.

    What was done, and with which server, is recorded in `registered/`. A reused export goes through here
    again when its registration failed, when the server is another or its database is gone, or when it was
    built with overrides and is now what the recipe says. Otherwise MLflow, which takes seconds to import, is
    not asked.
    """
    manifest = artifact.manifest
    if not manifest.asset.endswith("/exported_model") or not manifest.accepted:
        return
    record = run.store.home / "registered" / f"{manifest.fingerprint}.json"
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    database = Path(uri.removeprefix("sqlite:///"))
    there = database.is_file() if uri.startswith("sqlite:///") else True
    known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if there and known.get("tracking_uri") == public_address(uri) and (known["current"] or not run.current):
        return
    client = connect()
    _, run_id = open_training_run(client, branch, manifest.inputs["trained_checkpoints"].fingerprint)
    try:
        log_artifact(client, run_id, artifact)
        for name in EXPORT_FILES:
            client.log_artifact(run_id, str(artifact.file(name)), "exported_model")
        outcome = register(client, run_id, artifact, branch, run.store, move=run.current)
    finally:
        client.set_terminated(run_id)
    run.report.log(outcome)
    write_json(record, {"tracking_uri": public_address(uri), "current": run.current, "outcome": outcome})


def connect() -> Any:
    """A client of `MLFLOW_TRACKING_URI`.

    Raises:
        InputError: The server or database does not answer.
    """
    import logging

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow.tracking import MlflowClient

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{sft_home() / 'mlflow.db'}"
    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client
    except Exception as error:
        raise InputError(
            f"MLflow does not answer at {public_address(uri)}: {redacted(str(error))}. "
            "Check MLFLOW_TRACKING_URI"
        ) from error


def open_run(client: Any, branch: Branch, title: str, identity: Mapping[str, str]) -> tuple[str, str]:
    """(experiment id, run id) of the recipe's run with these tags, found again or made; it is RUNNING."""
    recipe = branch.require_recipe().name
    experiment = client.get_experiment_by_name(recipe)
    if experiment is None:
        # The default artifact root depends on the working directory; a server has its own.
        local = getattr(client, "tracking_uri", "sqlite:").startswith("sqlite:")
        location = (sft_home() / "mlflow_artifacts" / recipe).as_uri() if local else None
        experiment_id = client.create_experiment(recipe, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = client.search_runs([experiment_id], filter_string=wanted, max_results=1)
    if found:
        client.update_run(found[0].info.run_id, status="RUNNING")
        return experiment_id, found[0].info.run_id
    data = {"sft.recipe": recipe, "sft.dataset": branch.dataset.name, "sft.snapshot": branch.snapshot}
    run = client.create_run(experiment_id, run_name=title, tags={**data, **identity})
    return experiment_id, run.info.run_id


def open_training_run(client: Any, branch: Branch, training: str) -> tuple[str, str]:
    """(experiment id, run id) of the run that belongs to the training with this fingerprint."""
    title = f"{branch.require_recipe().name} {branch.snapshot}"
    return open_run(client, branch, title, {FINGERPRINT_TAG: training})


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Logs the parameters that a run does not have yet: MLflow refuses to change one."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    new = [Param(key, value[:LONGEST_PARAM]) for key, value in params.items() if key not in known]
    if new:
        client.log_batch(run_id, params=new)


class MlflowReporter(Reporter):
    """Logs metrics in batches.

    Args:
        trouble: Gets one warning if MLflow does not accept what it is sent.
        resumes: The steps go on where an earlier build of the same fingerprint was killed: a point that it
            had logged is not logged twice. Otherwise a later point replaces an earlier one.
    """

    def __init__(self, client: Any, run_id: str, trouble: Reporter, *, resumes: bool) -> None:
        self._client = client
        self._trouble = trouble
        self._warned = False
        self._run_id = run_id
        self._resumes = resumes
        self._waiting: list[Any] = []
        self._logged_to: dict[str, int] = {}
        self._last_flush = time.monotonic()

    def _is_new(self, key: str, step: int) -> bool:
        if not self._resumes:
            return True
        if key not in self._logged_to:
            history = self._client.get_metric_history(self._run_id, key)
            self._logged_to[key] = max((m.step for m in history), default=-1)
        if step <= self._logged_to[key]:
            return False
        self._logged_to[key] = step
        return True

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(k, float(v), now, step) for k, v in values.items() if self._is_new(k, step)]
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        text = json.dumps(list(rows), indent=2, ensure_ascii=False)
        with self._warn_once():
            self._client.log_text(self._run_id, text, f"samples/update-{step:06d}.json")

    @contextlib.contextmanager
    def _warn_once(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a lost point of a curve must not end a training
            if not self._warned:
                self._warned = True
                why = redacted(str(error))
                self._trouble.log(f"MLflow does not accept metrics, curves may have gaps: {why}", "warning")

    def flush(self) -> None:
        """Sends what is waiting; keeps it for the next time where MLflow does not answer."""
        self._last_flush = time.monotonic()
        with self._warn_once():
            log_metrics(self._client, self._run_id, self._waiting)
            self._waiting = []


def log_metrics(client: Any, run_id: str, metrics: Sequence[Any]) -> None:
    """Sends metrics in requests of the size that MLflow accepts."""
    for start in range(0, len(metrics), MOST_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])


def fill_curves(client: Any, run_id: str, artifact: Artifact) -> None:
    """Logs the points of the artifact's curves that MLflow lacks.

    A killed orchestrator takes with it what it had not sent yet, while the checkpoint after those updates may
    be whole, so that they are never made again. Such points get the time of the one before them.
    """
    import pyarrow.parquet as pq
    from mlflow.entities import Metric

    known = client.get_run(run_id).data.metrics
    missing = []
    for path in (artifact.path / "history.parquet", artifact.path / "throughput.parquet"):
        rows = pq.read_table(path).to_pylist() if path.is_file() else []
        for key in sorted({row["name"] for row in rows} & set(known)):
            logged = {m.step: m.timestamp for m in client.get_metric_history(run_id, key)}
            now = min(logged.values())
            for row in sorted((r for r in rows if r["name"] == key), key=lambda r: r["step"]):
                now = logged.get(row["step"], now)
                if row["step"] not in logged:
                    missing.append(Metric(key, row["value"], now, row["step"]))
    log_metrics(client, run_id, missing)


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings as {"a.b": "text"}."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in flatten(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): "null" if value is None else str(value)}


def log_artifact(client: Any, run_id: str, artifact: Artifact) -> None:
    """The manifest, the evidence and the plots; never the weights or the rows themselves."""
    stage = artifact.manifest.asset.split("/")[-1]
    client.log_artifact(run_id, str(artifact.path / "manifest.json"), f"manifests/{stage}")
    plots = artifact.path / "plots"
    if plots.is_dir():
        for path in sorted(plots.glob("*.png")):
            client.log_artifact(run_id, str(path), f"plots/{stage}")


def log_lineage(client: Any, run_id: str, artifact: Artifact) -> None:
    """The manifests and dataset inputs of everything upstream."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for upstream in ancestors(artifact):
        manifest = upstream.manifest
        client.log_artifact(
            run_id, str(upstream.path / "manifest.json"), f"manifests/{manifest.asset.split('/')[-1]}"
        )
        if manifest.asset.endswith(("/grouped_split", "/packed_shards", "/raw_rows")):
            dataset = Dataset(
                name=f"{manifest.asset}@{manifest.partition}",
                digest=manifest.data_version[:36],
                source_type="sft_artifact",
                source=json.dumps(
                    {"fingerprint": manifest.fingerprint, "data_version": manifest.data_version}
                ),
            )
            inputs.append(DatasetInput(dataset, tags=[InputTag("mlflow.data.context", "training")]))
    client.log_inputs(run_id, inputs)


def ancestors(artifact: Artifact) -> list[Artifact]:
    """Every upstream artifact that is still in the store, each once."""
    store = Store(Path(artifact.path).parent.parent)
    found: dict[str, Artifact] = {}
    todo = [artifact]
    while todo:
        for entry in todo.pop().manifest.inputs.values():
            upstream = store.get(entry.fingerprint)
            if upstream and entry.fingerprint not in found:
                found[entry.fingerprint] = upstream
                todo.append(upstream)
    return list(found.values())


# -- addresses in the two UIs, so that each can point at the other -----------------------------------


def dagster_run_url(run_id: str) -> str:
    base = os.environ.get("SFT_DAGSTER_URL") or f"http://127.0.0.1:{DAGSTER_PORT}"
    return f"{base.rstrip('/')}/runs/{run_id}"


def mlflow_run_url(experiment_id: str, run_id: str) -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    base = os.environ.get("SFT_MLFLOW_URL") or (
        public_address(uri) if uri.startswith("http") else f"http://127.0.0.1:{MLFLOW_PORT}"
    )
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"

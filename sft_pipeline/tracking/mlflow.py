"""One MLflow run per training, found again by its fingerprint: a retry or a resume goes on in the same run.

The orchestrator owns the run; the training child only writes events, which arrive here through a
Reporter. MLflow is an index. The manifests hold the truth, so what cannot be recorded (`tracking/server.py`)
fails nothing; it is noted in `untracked/`, and made up for when the artifact is next built or reused.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.project import sft_home
from sft_pipeline.reporting import Reporter, Tee
from sft_pipeline.secret_text import public_address
from sft_pipeline.stages.run import Run, Tracked
from sft_pipeline.stages.stage import Branch, Evidence, Stage
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import write_json
from sft_pipeline.tracking.curves import (
    CurvePoint,
    MlflowReporter,
    fill_curves,
    log_points,
    log_samples,
    read_curves,
)
from sft_pipeline.tracking.names import accepted_name, flatten
from sft_pipeline.tracking.registry import register
from sft_pipeline.tracking.server import GuardedClient, TrackedRun

FINGERPRINT_TAG = "sft.training_fingerprint"
DAGSTER_PORT, MLFLOW_PORT = 3000, 5000  # of `sft ui`
TRACKED = ("trained_checkpoints", "evaluation", "exported_model")
DESCRIBED = ("model", "template", "tokens", "packing", "training", "dataset")  # parameters of a run
# What MLflow keeps beside manifest and plots: the whole evaluation, and what a registered version points at.
EVALUATION_FILES = ("evaluation.json", "samples.parquet")
EXPORT_FILES = ("README.md", "manifest.json")
# What MLflow accepts in one request, and characters of a value.
MOST_PARAMS, LONGEST_PARAM = 100, 6000
AFTER = "The artifacts are built all the same; the next `sft run` sends to MLflow what it lacks now"


class MlflowTracker:
    """Tracks the expensive stages: training, evaluation, export.

    Args:
        dagster_run_id: Linked from the MLflow run.
        server: None for one of each stage's own.
    """

    def __init__(self, dagster_run_id: str | None, server: GuardedClient | None = None) -> None:
        self._dagster_run_id = dagster_run_id
        self._server = server

    @contextlib.contextmanager
    def __call__(
        self, stage: Stage, branch: Branch, fingerprint: str, inputs: Mapping[str, Artifact], report: Reporter
    ) -> Iterator[Tracked]:
        if stage.name not in TRACKED:
            yield Tracked(None, report)
            return
        trains = stage.name == "trained_checkpoints"
        training = fingerprint if trains else inputs["trained_checkpoints"].manifest.fingerprint
        run = training_run(self._server or GuardedClient(report, AFTER), branch, training)
        versions = {name: artifact.manifest.data_version for name, artifact in inputs.items()}
        describe(run, branch, versions, self._dagster_run_id)
        listener = MlflowReporter(run, resumes=trains)
        evidence = {"mlflow_run": Evidence("url", mlflow_run_url(*run.ids))} if run.ids else {}
        finished: list[Artifact] = []

        def committed(artifact: Artifact) -> None:
            finished.append(artifact)
            listener.flush()
            record(run, artifact)

        status = "KILLED"
        try:
            yield Tracked(run.run_id, Tee(report, listener), evidence, committed)
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            listener.flush()
            run.attempt(lambda client, run_id: client.set_terminated(run_id, status))
            if run.incomplete or listener.waiting or listener.waiting_samples:
                for artifact in finished:
                    note_untracked(artifact, listener.waiting, listener.waiting_samples)


def publish(artifact: Artifact, branch: Branch, run: Run, server: GuardedClient | None = None) -> None:
    """Makes up for what MLflow lacks of an artifact, built or reused; registers it if it is an export.

    An accepted export competes for the champion alias. What was done, and with which server, is recorded in
    `registered/`. A reused export goes through here again when its registration failed, when the server is
    another or its database is gone, or when it was built with overrides and is now what the recipe says.
    Otherwise MLflow, which takes seconds to import, is not asked.
    """
    manifest = artifact.manifest
    server = server or GuardedClient(run.report, AFTER)
    make_up_for(artifact, branch, server)
    if not manifest.asset.endswith("/exported_model") or not manifest.accepted:
        return
    noted = run.store.home / "registered" / f"{manifest.fingerprint}.json"
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    database = Path(uri.removeprefix("sqlite:///"))
    there = database.is_file() if uri.startswith("sqlite:///") else True
    known = json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}
    if there and known.get("tracking_uri") == public_address(uri) and (known["current"] or not run.current):
        return
    tracked = training_run(server, branch, manifest.inputs["trained_checkpoints"].fingerprint)
    outcomes: list[str] = []

    def registering(client: Any, run_id: str) -> None:
        log_artifact(client, run_id, artifact)
        for name in EXPORT_FILES:
            client.log_artifact(run_id, str(artifact.file(name)), "exported_model")
        outcomes.append(register(client, run_id, artifact, branch, run.store, move=run.current))

    tracked.attempt(registering)
    for outcome in outcomes:
        run.report.log(outcome)
        write_json(noted, {"tracking_uri": public_address(uri), "current": run.current, "outcome": outcome})
    if tracked.ids:
        tracked.attempt(lambda client, run_id: client.set_terminated(run_id))


# -- what MLflow is told of an artifact --------------------------------------------------------------


def describe(
    run: TrackedRun, branch: Branch, versions: Mapping[str, str], dagster_run_id: str | None
) -> None:
    """What the run read, which Dagster run it belongs to, and the recipe."""
    tags = {f"sft.input.{name}": version for name, version in versions.items()}
    if dagster_run_id:
        tags["sft.dagster_run_id"] = dagster_run_id
        tags["sft.dagster_run"] = dagster_run_url(dagster_run_id)
    params = flatten(branch.require_recipe().model_dump(mode="json", include=set(DESCRIBED)))

    def telling(client: Any, run_id: str) -> None:
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
        log_params(client, run_id, params)

    run.attempt(telling)


def record(run: TrackedRun, artifact: Artifact) -> None:
    """The files of a finished artifact, each kind by itself: what fails takes no other along."""
    stage = artifact.manifest.asset.split("/")[-1]
    if stage != "exported_model":  # what `publish` logs
        run.attempt(lambda client, run_id: log_artifact(client, run_id, artifact))
    if stage == "trained_checkpoints":
        curves = read_curves(artifact)
        run.attempt(lambda client, run_id: fill_curves(client, run_id, curves))
        run.attempt(lambda client, run_id: log_lineage(client, run_id, artifact))
    for name in EVALUATION_FILES if stage == "evaluation" else ():
        run.attempt(partial(log_file, path=artifact.file(name), folder=stage))


def log_file(client: Any, run_id: str, path: Path, folder: str) -> None:
    client.log_artifact(run_id, str(path), folder)


def note_untracked(artifact: Artifact, points: Sequence[CurvePoint], samples: Mapping[str, str]) -> None:
    """Notes that MLflow lacks something of an artifact, and what of it is in no file of the artifact."""
    with contextlib.suppress(OSError):  # a full disk, say, which ends the run soon enough
        write_json(_untracked(artifact), {"points": points, "samples": samples})


def make_up_for(artifact: Artifact, branch: Branch, server: GuardedClient) -> None:
    """Records what could not be recorded when the artifact was built."""
    note, manifest = _untracked(artifact), artifact.manifest
    if not note.is_file():
        return
    try:
        noted = json.loads(note.read_bytes())
        points: list[CurvePoint] = [(str(n), float(v), int(ms), int(s)) for n, v, ms, s in noted["points"]]
        samples = {str(name): str(text) for name, text in noted["samples"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # the artifact has the rest
        points, samples = [], {}
    trains = manifest.asset.endswith("/trained_checkpoints")
    training = manifest.fingerprint if trains else manifest.inputs["trained_checkpoints"].fingerprint
    run = training_run(server, branch, training)
    versions = {n: e.data_version for n, e in manifest.inputs.items() if e.role == "data"}
    describe(run, branch, versions, manifest.dagster_run_id)
    run.attempt(lambda client, run_id: log_points(client, run_id, points))
    run.attempt(lambda client, run_id: log_samples(client, run_id, samples))
    record(run, artifact)
    run.attempt(lambda client, run_id: client.set_terminated(run_id))
    if not run.incomplete:
        note.unlink(missing_ok=True)  # another run may have done the same


def _untracked(artifact: Artifact) -> Path:
    return artifact.path.parent.parent / "untracked" / f"{artifact.manifest.fingerprint}.json"


# -- runs --------------------------------------------------------------------------------------------


def open_run(client: Any, branch: Branch, title: str, identity: Mapping[str, str]) -> tuple[str, str]:
    """(experiment id, run id) of the recipe's run with these tags, found again or made; it is RUNNING."""
    recipe = branch.require_recipe().name
    experiment = client.get_experiment_by_name(recipe)
    if experiment is None:
        # The default artifact root depends on the working directory; a server has its own.
        local = getattr(client, "tracking_uri", "sqlite:").startswith("sqlite:")
        location = (sft_home() / "mlflow_artifacts" / recipe).as_uri() if local else None
        experiment_id = client.create_experiment(recipe, artifact_location=location)
    elif experiment.lifecycle_stage == "deleted":
        raise InputError(f"the experiment {recipe} ({experiment.experiment_id}) is deleted")
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


def training_run(server: GuardedClient, branch: Branch, training: str) -> TrackedRun:
    return TrackedRun(server, lambda client: open_training_run(client, branch, training))


def log_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    """Logs the parameters that a run does not have yet: MLflow refuses to change one."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    accepted = {accepted_name(name): value for name, value in params.items()}
    new = [Param(name, value[:LONGEST_PARAM]) for name, value in accepted.items() if name not in known]
    for start in range(0, len(new), MOST_PARAMS):
        client.log_batch(run_id, params=new[start : start + MOST_PARAMS])


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

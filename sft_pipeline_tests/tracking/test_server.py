"""Whatever becomes of MLflow, artifacts are built, one warning is given, and nobody waits for minutes."""

import shutil
import sqlite3
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import locked
from sft_pipeline.tracking.mlflow import AFTER, publish
from sft_pipeline.tracking.server import GuardedClient, connect, described
from sft_pipeline_tests.tracking.artifacts import (
    BRANCH,
    Heard,
    champion,
    decision,
    export,
    put,
    register,
    track,
)
from sft_pipeline_tests.tracking.stand_ins import KINDS, stand_in

SECRETS = ("s3cret-word", "qu3ry-secret")
WORDS = {
    "refuses": ("does not answer", "Start the server"),
    "hangs": ("does not answer", "Start the server"),
    "401": ("refuses the credentials", "MLFLOW_TRACKING_PASSWORD"),
    "500": ("fails", "its log"),
    "503": ("fails", "its log"),
}
SECONDS = 60  # far below MLflow's own minutes


def build_branch(server: GuardedClient, during: Callable[[str], Any] = lambda run_id: None) -> list[Artifact]:
    """What a run tells MLflow: a training and an evaluation are tracked, an export is registered."""
    store, run = Store(), Run(Store(), Reporter())
    with track("trained_checkpoints", "1" * 63 + "a", {}, server) as tracked:
        tracked.report.metrics({"loss": 3.0}, 1)
        during(tracked.run_id)
        tracked.report.metrics({"loss": 2.0}, 2)
        tracked.report.samples([{"prompt": "a", "reply": "b"}], 2)
        made = export(store, "1", {"A": 1.0})
        trained, judged = (store.get(i.fingerprint) for i in made.manifest.inputs.values())
        assert trained and judged
        tracked.committed(trained)
    publish(trained, BRANCH, run, server)
    with track(
        "evaluation", judged.manifest.fingerprint, {"trained_checkpoints": trained}, server
    ) as tracked:
        tracked.report.metrics({"validation/right": 1.0}, 2)
        tracked.committed(judged)
    publish(judged, BRANCH, run, server)
    publish(made, BRANCH, run, server)
    return [trained, judged, made]


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


def run_of(client: Any) -> Any:
    [found] = client.search_runs([client.get_experiment_by_name("r").experiment_id])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_no_good_is_one_warning_and_costs_seconds(
    home: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with stand_in(kind) as bad:
        uri = f"http://user:{SECRETS[0]}@127.0.0.1:{bad.port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        heard, began = Heard(), time.monotonic()
        built = build_branch(GuardedClient(heard, AFTER))
        assert time.monotonic() - began < SECONDS
        assert kind != "hangs" or len(bad.asked) == 2, "one call and its retry; then it is left alone"
    assert all(artifact.manifest.accepted for artifact in built)
    [warning] = heard.warnings
    assert f"http://127.0.0.1:{bad.port}" in warning and all(word in warning for word in WORDS[kind])
    seen = capfd.readouterr()
    assert not any(secret in text for secret in SECRETS for text in (warning, seen.out, seen.err))
    assert (seen.out, seen.err) == ("", ""), "no library says it a second time"


def test_a_later_step_of_the_run_neither_waits_nor_warns_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    with stand_in("hangs") as bad:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bad.port}")
        assert not GuardedClient(Heard(), remember=kept.append).attempt(lambda client: None)
        asked, later = len(bad.asked), Heard()
        build_branch(GuardedClient(later, outage=kept[-1]))
        assert len(bad.asked) == asked and not later.warnings


@pytest.mark.parametrize("kind", ["refuses", "401", "500"])
def test_what_could_not_be_recorded_is_made_up_for(client, home: Path, kind: str) -> None:
    with stand_in(kind) as bad, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bad.port}")
        built = build_branch(GuardedClient(Heard()))
    heard = Heard()
    for artifact in built:
        register(artifact, report=heard)
    run = run_of(client)
    loss = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in loss] == [(1, 3.0), (2, 2.0)]
    assert run.data.metrics["validation/right"] == 1.0 and run.info.status == "FINISHED"
    assert run.data.params["training.epochs"] == "2" and run.data.tags["sft.input.trained_checkpoints"]
    names = {a.path for a in client.list_artifacts(run.info.run_id, "manifests")}
    assert names >= {"manifests/trained_checkpoints", "manifests/evaluation", "manifests/exported_model"}
    assert champion(client) == "1" and not heard.warnings
    assert client.list_artifacts(run.info.run_id, "samples")[0].path == "samples/update-000002.json"
    assert not list((home / "untracked").iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"points": 1}', '{"points": [["a"]], "samples": {}}'])
def test_a_damaged_note_costs_what_only_it_held(client, home: Path, text: str) -> None:
    with stand_in("refuses") as bad, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bad.port}")
        built = build_branch(GuardedClient(Heard()))
    for note in (home / "untracked").iterdir():
        note.write_text(text)
    heard = Heard()
    for artifact in built:
        register(artifact, report=heard)
    assert not heard.warnings and not list((home / "untracked").iterdir())
    assert run_of(client).info.status == "FINISHED"


def test_a_setup_lock_that_another_process_keeps_costs_seconds(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sft_pipeline.store.files.locked_if_possible.__kwdefaults__", {"wait_seconds": 0.2})
    with locked(home / ".mlflow.lock"):
        assert connect().search_experiments()
    assert "going on without a lock" in caplog.text


def test_an_outage_that_cannot_be_noted_ends_nothing() -> None:
    client = GuardedClient(Heard(), remember=raising(OSError("the database is locked")))
    assert not client.attempt(raising(ConnectionError("connection refused")))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("database is locked", "locked database"),
        ("the request was blocked by a filter", "fails"),
        ("preset not found", "fails"),
        ("Connection reset by peer", "does not answer"),
        ("429 quota of requests exceeded", "asks to be called less often"),
        ("quota exceeded", "has no room left"),
    ],
)
def test_what_an_error_says_names_the_problem(said: str, words: str) -> None:
    assert words in described(RuntimeError(said))


def test_points_of_a_server_that_comes_back_during_the_training_are_not_lost(
    client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    heard = Heard()
    monkeypatch.setattr("sft_pipeline.tracking.curves.FLUSH_SECONDS", -1)  # every point is sent at once
    with track("trained_checkpoints", "2" * 64, {}, GuardedClient(heard)) as tracked:
        tracked.report.metrics({"loss": 3.0}, 1)
        with pytest.MonkeyPatch.context() as away:
            away.setattr(MlflowClient, "log_batch", raising(ConnectionError("connection refused")))
            tracked.report.metrics({"loss": 2.0}, 2)
            tracked.report.metrics({"loss": 1.0}, 3)
        assert [m.step for m in client.get_metric_history(tracked.run_id, "loss")] == [1]
        tracked.report.metrics({"loss": 0.5}, 4)
        assert [m.step for m in client.get_metric_history(tracked.run_id, "loss")] == [1, 2, 3, 4]
    assert len(heard.warnings) == 1


def test_a_deleted_experiment_is_named_with_the_remedy_and_made_up_for_when_it_is_restored(client) -> None:
    experiment = client.create_experiment("r")
    client.delete_experiment(experiment)
    heard = Heard()
    built = build_branch(GuardedClient(heard, AFTER))
    [warning] = heard.warnings
    assert (
        f"the experiment r ({experiment}) is deleted" in warning and "mlflow experiments restore" in warning
    )
    client.restore_experiment(experiment)
    for artifact in built:
        register(artifact, report=heard)
    assert run_of(client).data.metrics["loss"] == 2.0 and champion(client) == "1"
    assert len(heard.warnings) == 1


def test_a_run_that_is_deleted_during_the_training_is_followed_by_another(client) -> None:
    heard = Heard()
    deleted: list[str] = []

    def delete(run_id: str) -> None:
        deleted.append(run_id)
        client.delete_run(run_id)

    build_branch(GuardedClient(heard, AFTER), during=delete)
    [warning] = heard.warnings
    assert "deleted" in warning and "mlflow runs restore" in warning
    run = run_of(client)
    assert run.info.run_id not in deleted and run.data.metrics["loss"] == 2.0 and champion(client) == "1"


def test_a_deleted_registered_model_is_made_again_by_the_next_export(client) -> None:
    heard, store = Heard(), Store()
    register(export(store, "1", {"A": 1.0}), report=heard)
    client.delete_registered_model("r")
    register(export(store, "2", {"A": 0.5}), report=heard)
    assert champion(client) == "1" and client.get_model_version("r", "1").tags["sft.fingerprint"][0] == "2"
    assert not heard.warnings


@pytest.fixture
def tiny_artifact_disk(home: Path) -> Iterator[Path]:
    """MLflow's artifacts on a file system of 16 KiB."""
    folder = home / "mlflow_artifacts"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    (folder / "filler").write_bytes(b"x" * 12288)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_of_mlflow_is_one_warning_and_curves_are_still_kept(
    client, home: Path, tiny_artifact_disk: Path
) -> None:
    heard = Heard()
    assert len(build_branch(GuardedClient(heard, AFTER))) == 3
    [warning] = heard.warnings
    assert "has no room left" in warning and "Make room" in warning
    assert run_of(client).data.metrics["loss"] == 2.0


@pytest.mark.slow  # MLflow waits for 20 seconds at a locked database
def test_a_locked_database_is_one_warning_and_costs_seconds(client, home: Path) -> None:
    holder = sqlite3.connect(home / "mlflow.db", isolation_level=None)
    heard, began = Heard(), time.monotonic()
    built = build_branch(GuardedClient(heard, AFTER), during=lambda _: holder.execute("BEGIN EXCLUSIVE"))
    assert time.monotonic() - began < SECONDS
    [warning] = heard.warnings
    assert "locked" in warning and str(home / "mlflow.db") in warning and "End the process" in warning
    holder.execute("ROLLBACK")
    for artifact in built:
        register(artifact)
    assert run_of(client).data.metrics["loss"] == 2.0 and champion(client) == "1"


def test_an_unreachable_server_prints_no_secret(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRETS[0]}@127.0.0.1:9/?key={SECRETS[1]}")
    with pytest.raises(InputError, match=r"MLflow does not answer at http://127\.0\.0\.1:9") as caught:
        connect()
    said = "".join(traceback.format_exception(caught.value))
    assert not any(secret in said for secret in SECRETS)


def test_a_sweep_goes_on_without_mlflow(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_pipeline.tracking.sweep import SweepTracker

    heard = Heard()
    trained = put(Store(), "r/trial_training", "3" * 64, {})
    with stand_in("500") as bad:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{bad.port}")
        with SweepTracker("sweep-1", BRANCH, heard) as tracker:
            tracker.describe({"points": [], "budget": {"supervised_tokens": 1}, "gates": [], "rank_by": []})
            stage = replace(STAGES["trained_checkpoints"], name="trial_training")
            with tracker.of("lr 1")(stage, BRANCH, "3" * 64, {}, heard) as tracked:
                tracked.report.metrics({"loss": 1.0}, 1)
                tracked.committed(trained)
            child = tracker.child_of("lr 1", BRANCH, trained)
            tracker.ended(child, "judged", {"right": 1.0}, 10)
            tracker.finish("done", tmp_path, {}, {"right": 1.0})
    assert (tracker.run_id, child) == (None, None)
    [warning] = heard.warnings
    assert f"http://127.0.0.1:{bad.port}" in warning and "The sweep goes on" in warning


# -- the registry ------------------------------------------------------------------------------------


def test_a_registration_that_failed_is_made_up_for_when_the_export_is_reused(client) -> None:
    from mlflow.tracking import MlflowClient

    made, heard = export(Store(), "1", {"A": 1.0}), Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", raising(ConnectionError("refused")))
        register(made, report=heard)
    assert len(heard.warnings) == 1
    register(made)
    assert champion(client) == "1" and len(client.search_model_versions("name='r'")) == 1
    with pytest.MonkeyPatch.context() as patch:  # once it is done, MLflow is not asked again
        patch.setattr("sft_pipeline.tracking.server.connect", raising(ConnectionError("refused")))
        register(made, report=heard)
        register(made, current=False, report=heard)
    assert len(heard.warnings) == 1


def test_another_server_or_a_lost_database_has_the_export_registered_again(
    client, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, heard = export(Store(), "1", {"A": 1.0}), Heard()
    register(made)
    with stand_in("401") as other:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{other.port}")
        register(made, report=heard)
        assert other.asked and len(heard.warnings) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/lost.db")
    shutil.move(home / "mlflow.db", home / "moved.db")
    register(made)
    assert champion(connect()) == "1"


@pytest.mark.parametrize("method", ["get_model_version_by_alias", "create_registered_model"])
def test_a_locked_database_does_not_make_a_worse_model_the_champion(client, method: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    register(export(Store(), "1", {"A": 1.0}))
    worse, heard = export(Store(), "2", {"A": 0.0}), Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, method, raising(MlflowException("database is locked")))
        register(worse, report=heard)
    assert len(heard.warnings) == 1 and "locked" in heard.warnings[0]
    assert champion(client) == "1"
    register(worse)
    assert champion(client) == "1" and "0.0000 against 1.0000" in decision(client, "2")

"""MLflow on sqlite: one run per training fingerprint, one curve across a retry, and the champion alias."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_pipeline.store import Artifact, Store
from sft_pipeline_tests.tracking.artifacts import champion, decision, export, put, ranked_by, register, track


def test_a_retry_goes_on_in_the_same_run_with_one_curve(client, home: Path) -> None:
    rows = put(Store(), "d/raw_rows", "1" * 64, {})
    with (
        pytest.raises(RuntimeError),
        track("trained_checkpoints", "2" * 64, {"packed_shards": rows}) as first,
    ):
        first.report.metrics({"loss": 3.0}, 1)
        first.report.metrics({"loss": 2.0}, 2)
        raise RuntimeError("killed")
    assert client.get_run(first.run_id).info.status == "FAILED"
    with track("trained_checkpoints", "2" * 64, {"packed_shards": rows}) as second:
        second.report.metrics({"loss": 2.0}, 2)
        second.report.metrics({"loss": 1.0}, 3)
        second.report.samples([{"prompt": "a", "reply": "b"}], 3)
        second.committed(put(Store(), "r/trained_checkpoints", "2" * 64, {"packed_shards": rows}))
    assert second.run_id == first.run_id
    run = client.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert [(m.step, m.value) for m in client.get_metric_history(second.run_id, "loss")] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]
    assert run.data.params["training.epochs"] == "2"
    assert run.data.tags["sft.dagster_run_id"] == "dagster-run"
    assert [i.dataset.name for i in run.inputs.dataset_inputs] == ["d/raw_rows@s1"]
    assert second.evidence["mlflow_run"].value.endswith(f"/runs/{second.run_id}")
    names = {a.path for a in client.list_artifacts(second.run_id, "manifests")}
    assert names == {"manifests/raw_rows", "manifests/trained_checkpoints"}


def test_points_that_a_killed_orchestrator_took_along_are_filled_in_from_the_artifact(
    client, tmp_path
) -> None:
    from mlflow.entities import Metric

    from sft_pipeline.tracking.curves import fill_curves, read_curves

    experiment = client.create_experiment("gaps", artifact_location=str(tmp_path / "files"))
    run_id = client.create_run(experiment).info.run_id
    client.log_batch(run_id, metrics=[Metric("loss", 4.0 - step, 100 + step, step) for step in (1, 4)])
    rows = [{"name": "loss", "step": s, "value": 4.0 - s} for s in (1, 2, 3, 4)] + [
        {"name": "other", "step": 1, "value": 0.0}
    ]
    (tmp_path / "trained").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "trained" / "history.parquet")
    for _ in range(2):  # a second time adds nothing
        fill_curves(client, run_id, read_curves(Artifact(tmp_path / "trained")))
        curve = client.get_metric_history(run_id, "loss")
        assert [(m.step, m.value) for m in sorted(curve, key=lambda m: m.step)] == [
            (s, 4.0 - s) for s in (1, 2, 3, 4)
        ]
    assert [m.timestamp for m in sorted(curve, key=lambda m: m.step)] == [101, 101, 101, 104]


def test_another_training_is_another_run(client) -> None:
    with track("trained_checkpoints", "2" * 64, {}) as first:
        pass
    with track("trained_checkpoints", "3" * 64, {}) as second:
        pass
    assert first.run_id != second.run_id


def test_data_stages_open_no_run() -> None:
    with track("packed_shards", "2" * 64, {}) as tracked:
        assert tracked.run_id is None


def test_evaluation_and_export_reach_the_run_and_the_champion_moves_only_to_a_better_model(client) -> None:
    store = Store()

    def one(name: str, scores: dict[str, float]) -> str:
        made = export(store, name, scores)
        training, judged = (store.get(i.fingerprint) for i in made.manifest.inputs.values())
        with track("evaluation", judged.manifest.fingerprint, {"trained_checkpoints": training}) as tracked:
            tracked.report.metrics({"validation/right": sum(scores.values()) / len(scores)}, 10)
            tracked.committed(judged)
        register(made)
        return tracked.run_id

    run_id = one("1", {"A": 1.0, "B": 0.0})
    run = client.get_run(run_id)
    assert run.data.metrics["validation/right"] == 0.5 and run.info.status == "FINISHED"
    assert client.get_metric_history(run_id, "validation/right")[0].step == 10
    assert client.get_model_version("r", "1").run_id == run_id
    assert {a.path for a in client.list_artifacts(run_id, "exported_model")} == {
        "exported_model/README.md",
        "exported_model/manifest.json",
    }
    assert champion(client) == "1"
    one("2", {"A": 1.0, "B": 0.0, "C": 1.0})  # no better on the groups both were judged on
    assert champion(client) == "1"
    one("3", {"X": 1.0})  # no group in common
    assert champion(client) == "1"
    one("4", {"A": 1.0, "B": 1.0})
    assert champion(client) == "4"
    assert "2 shared test groups" in decision(client, "4")
    assert "shares no test group" in decision(client, "3")


def test_scores_of_another_grader_move_no_alias(client) -> None:
    """An edited grader file, or a grader of the same name with other settings, is another measure."""
    store = Store()

    def judged_by(digest: str, call: str = "mine:right") -> dict[str, Any]:
        grader = {"name": "right", "kind": "python", "callable": call}
        return {"config": {"evaluation": {"graders": [grader]}}, "outside": {"mine.py": digest, "base": "b"}}

    for name, scores, fields in [
        ("1", {"A": 0.5}, judged_by("x")),
        ("2", {"A": 1.0}, judged_by("edited")),
        ("3", {"A": 1.0}, judged_by("x", "mine:kinder")),
        ("4", {"A": 0.75}, judged_by("x")),
    ]:
        register(export(store, name, scores, **fields))
    for version in ("2", "3"):
        assert "the grader right is another" in decision(client, version)
    assert champion(client) == "4" and "on 1 shared test groups" in decision(client, "4")


def test_a_loss_is_compared_on_the_test_rows_that_both_have(client) -> None:
    store, branch = Store(), ranked_by("-val_loss")
    for name, losses, template in [
        ("1", {"a": 1.0, "b": 1.0}, "chatml"),
        ("2", {"a": 1.5, "b": 1.5, "new": 0.1}, "chatml"),  # better on all it has, worse on what both have
        ("3", {"a": 0.1, "b": 0.1}, "another"),
        ("4", {"x": 0.1}, "chatml"),
        ("5", {"b": 0.75, "new": 9.0}, "chatml"),  # the test split of a later snapshot is another one
    ]:
        register(export(store, name, {"A": 1.0}, losses=losses, template=template), branch=branch)
    assert decision(client, "2") == "test_loss 1.5000 against 1.0000 of version 1 on 2 shared test rows"
    assert "another tokenizer, chat template or mask" in decision(client, "3")
    assert "share no test row" in decision(client, "4")
    assert champion(client) == "5"
    assert decision(client, "5") == "test_loss 0.7500 against 1.0000 of version 1 on 1 shared test rows"


def test_what_cannot_be_compared_keeps_the_champion_and_says_why(client) -> None:
    store = Store()
    register(export(store, "1", {"A": 0.0}))
    register(export(store, "2", {"A": 1.0}), branch=ranked_by("new_grader"))
    assert decision(client, "2").endswith("version 1: the champion has no scores of new_grader")
    register(export(store, "3", {"A": 1.0}), branch=ranked_by("-val_loss"))
    assert decision(client, "3").endswith("version 1: they share no test row")
    assert champion(client) == "1"


def test_an_export_built_with_overrides_competes_once_the_recipe_says_the_same(client) -> None:
    store = Store()
    register(export(store, "1", {"A": 0.0}))
    better = export(store, "2", {"A": 1.0})
    register(better, current=False)
    assert champion(client) == "1" and "overrides" in decision(client, "2")
    register(better)
    assert champion(client) == "2" and len(client.search_model_versions("name='r'")) == 2


def test_a_registered_export_is_reused_without_importing_mlflow(client, home: Path) -> None:
    made = export(Store(), "1", {"A": 1.0})
    register(made)
    code = (
        "import sys; from pathlib import Path; from sft_pipeline.reporting import Reporter; "
        "from sft_pipeline.stages.run import Run; from sft_pipeline.store import Artifact, Store; "
        "from sft_pipeline.tracking.mlflow import publish; "
        f"publish(Artifact(Path({str(made.path)!r})), None, Run(Store(), Reporter())); "
        "print('mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_links_and_records_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_pipeline.tracking.mlflow import mlflow_run_url

    monkeypatch.delenv("SFT_MLFLOW_URL", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://user:s3cret-word@mlflow.example/x?key=qu3ry-secret")
    assert mlflow_run_url("1", "r") == "https://mlflow.example/x/#/experiments/1/runs/r"

"""A whole branch whose MLflow server accepts connections and never answers: built, told once, made up for."""

from pathlib import Path

import pytest

from sft_pipeline_tests.branches import SHORT, write_branch
from sft_pipeline_tests.command import sft, sft_process
from sft_pipeline_tests.tracking.stand_ins import stand_in


@pytest.mark.slow
def test_a_whole_run_is_exported_all_the_same_and_recorded_by_the_next(tmp_path: Path) -> None:
    config, home = write_branch(tmp_path / "config", recipe=SHORT), tmp_path / "home"
    with stand_in("hangs") as bad:
        uri = f"http://127.0.0.1:{bad.port}"
        ran = sft_process("run", "small_lora", "--json", home=home, config=config, MLFLOW_TRACKING_URI=uri)
        assert len(bad.asked) == 2, "the first call and its retry: no later stage waits again"
    assert ran.code == 0 and ran.json, ran.stderr[-4000:]
    assert ran.json["status"] == "exported" and ran.json["mlflow_run_id"] is None
    [warning] = [line for line in ran.stderr.splitlines() if "MLflow" in line]
    assert "does not answer" in warning and uri in warning and "MLFLOW_TRACKING_URI" in warning

    again = sft("run", "small_lora", "--json", home=home, config=config)
    assert again.code == 0 and again.json and len(again.json["cached"]) == 9
    assert "MLflow" not in again.stderr
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small_lora").experiment_id
    [run] = client.search_runs([experiment])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 4
    assert {"val_loss", "validation/says_number", "test/tuned_says_number"} <= set(run.data.metrics)
    assert run.data.params["training.max_steps"] == "4"
    assert run.data.tags["sft.dagster_run_id"] == ran.json["dagster_run_id"]
    assert str(client.get_model_version_by_alias("small_lora", "champion").version) == "1"

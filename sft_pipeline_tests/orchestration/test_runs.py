"""Dagster runs over small data: partitions, refusals, sensor and schedule."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.load import Catalog
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.definitions import build_definitions

ROWS = [
    {"thread_id": f"T{i}", "prompt": f"Say the number {i}, please.", "completion": f"The number is {i}."}
    for i in range(60)
]
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.get() as found:
        yield found


def catalog(
    folder: Path, rows: list[dict] = ROWS, snapshots: tuple[str, ...] = ("s1",), **contract: float
) -> Catalog:
    for snapshot in snapshots:
        (folder / "rows" / snapshot).mkdir(parents=True, exist_ok=True)
        (folder / "rows" / snapshot / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    dataset = DatasetConfig(
        name="small",
        sources=[{"path": str(folder / "rows"), "columns": {"group": "thread_id"}}],
        contract=contract or {},
    )
    recipe = RecipeConfig(
        name="small_lora",
        dataset="small",
        model={"base": "data/base_model"},
        retrain={"on_new_snapshot": True, "cron": "0 3 * * 1"},
    )
    return Catalog(datasets={"small": dataset}, recipes={"small_lora": recipe})


def materialize(
    instance: dg.DagsterInstance, found: Catalog, *assets: str, snapshot: str = "s1"
) -> dg.ExecuteInProcessResult:
    instance.add_dynamic_partitions("small_snapshots", [snapshot])
    keys = [dg.AssetKey(a.split("/")) for a in assets]
    job = build_definitions(found).resolve_job_def("small_lora_job")
    return job.execute_in_process(
        instance=instance,
        partition_key=snapshot,
        asset_selection=keys,
        raise_on_error=False,
        run_config=QUIET,
    )


def message(result: dg.ExecuteInProcessResult) -> str:
    return " ".join(
        str(e.event_specific_data) for e in result.all_events if e.event_type_value == "STEP_FAILURE"
    )


def test_a_materialization_carries_the_artifacts_version_and_its_checks(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    result = materialize(instance, catalog(tmp_path), "small/raw_rows", "small/validated_rows")
    assert result.success, message(result)
    event = next(e for e in result.asset_materializations_for_node("small__validated_rows"))
    manifest = json.loads((Path(event.metadata["path"].value) / "manifest.json").read_text())
    assert event.tags["dagster/data_version"] == manifest["data_version"]
    assert manifest["dagster_run_id"] == result.run_id
    assert event.metadata["dagster/row_count"].value == 60
    assert {e.check_name for e in result.get_asset_check_evaluations()} >= {"reject_rate"}


def test_a_failed_blocking_check_stops_the_run_and_a_later_one_refuses(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    found = catalog(
        tmp_path, [*ROWS, {"thread_id": "B1", "prompt": "x", "completion": ""}], max_reject_rate=0.0
    )
    first = materialize(instance, found, "small/raw_rows", "small/validated_rows", "small/grouped_split")
    assert not first.success
    assert not [
        e
        for e in first.all_events
        if e.event_type_value == "STEP_START" and "grouped_split" in (e.step_key or "")
    ]
    later = materialize(instance, found, "small/grouped_split")
    assert not later.success
    assert "small/validated_rows of snapshot s1 is not accepted" in message(
        later
    ) and "reject_rate" in message(later)


def test_downstream_alone_needs_its_input(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    result = materialize(instance, catalog(tmp_path), "small_lora/trained_checkpoints")
    assert not result.success
    assert "is not built for snapshot s1: materialize it first" in message(result)


def test_bad_input_is_told_and_not_retried(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    found = catalog(tmp_path)
    (tmp_path / "rows" / "s1" / "rows.jsonl").unlink()
    result = materialize(instance, found, "small/raw_rows")
    assert not result.success
    assert str(tmp_path / "rows") in message(result)
    assert not [e for e in result.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]


def test_interleaved_snapshots_each_read_their_own(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    found = catalog(tmp_path, snapshots=("s1", "s2"))
    (tmp_path / "rows" / "s2" / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS[:40]))
    materialize(instance, found, "small/raw_rows", snapshot="s1")
    materialize(instance, found, "small/raw_rows", snapshot="s2")
    result = materialize(instance, found, "small/validated_rows", snapshot="s1")
    event = next(e for e in result.asset_materializations_for_node("small__validated_rows"))
    assert event.metadata["dagster/row_count"].value == 60


def test_the_sensor_registers_snapshots_and_runs_only_on_a_new_one(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    def look(cursor: str | None) -> dg.SensorResult:
        sensor = build_definitions(catalog(tmp_path)).resolve_sensor_def("small_snapshots")
        return sensor(dg.build_sensor_context(instance=instance, cursor=cursor))

    first = look(None)
    assert [list(r.partition_keys) for r in first.dynamic_partitions_requests] == [["s1"]]
    assert not first.run_requests and first.cursor == "s1"
    (tmp_path / "rows" / "s2").mkdir()
    (tmp_path / "rows" / "s2" / "rows.jsonl").write_text("{}\n")
    second = look(first.cursor)
    assert [r.partition_key for r in second.run_requests] == ["s2"]
    assert second.run_requests[0].run_key.startswith("small_lora_job:s2:")
    assert not look(second.cursor).run_requests


@pytest.mark.parametrize("folder_exists", [True, False])
def test_the_first_snapshot_of_a_dataset_that_had_none_starts_runs(
    instance: dg.DagsterInstance, tmp_path: Path, folder_exists: bool
) -> None:
    found = catalog(tmp_path, snapshots=())
    if folder_exists:
        (tmp_path / "rows").mkdir()
    sensor = build_definitions(found).resolve_sensor_def("small_snapshots")

    def look(cursor: str | None) -> tuple[list[str], str | None]:
        """The snapshots that get a run, and the cursor that Dagster keeps."""
        context = dg.build_sensor_context(instance=instance, cursor=cursor)
        result = sensor(context)
        if isinstance(result, dg.SkipReason):
            return [], context.cursor
        return [r.partition_key for r in result.run_requests], result.cursor or context.cursor

    requests, cursor = look(None)
    assert not requests and look(cursor) == ([], cursor)
    catalog(tmp_path)
    assert look(cursor) == (["s1"], "s1") and look("s1") == ([], "s1")
    shutil.rmtree(tmp_path / "rows")
    assert look("s1") == ([], "s1")


def test_the_schedule_takes_the_newest_snapshot(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    definitions = build_definitions(catalog(tmp_path))
    schedule = definitions.resolve_schedule_def("small_lora_schedule")
    assert schedule.cron_schedule == "0 3 * * 1"
    assert schedule.evaluate_tick(dg.build_schedule_context(instance=instance)).skip_message
    instance.add_dynamic_partitions("small_snapshots", ["s1", "s2"])
    context = dg.build_schedule_context(instance=instance, repository_def=definitions.get_repository_def())
    requests = schedule.evaluate_tick(context).run_requests
    assert [r.partition_key for r in requests] == ["s2"]

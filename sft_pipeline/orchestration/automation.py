"""What runs by itself: a job per recipe, a sensor that finds snapshots, a schedule that retrains."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.orchestration.assets import partitions_of
from sft_pipeline.store.files import sha256_json

SENSOR_SECONDS = 30
NONE_YET = "/"  # the cursor of a sensor that has looked and found nothing; no snapshot is named so


def _described(what: str, by_its_file: str) -> str:
    """What something does, and below it what the YAML file says about it."""
    return f"{what}\n\n{by_its_file}" if by_its_file else what


def branch_job(dataset: DatasetConfig, recipe: RecipeConfig) -> Any:
    """The whole branch, from raw rows to the exported model."""
    return dg.define_asset_job(
        f"{recipe.name}_job",
        selection=dg.AssetSelection.groups(dataset.name, recipe.name),
        description=_described(
            f"{dataset.name} to {recipe.name}: every asset of the branch, for one snapshot.",
            recipe.description,
        ),
        tags={"sft/recipe": recipe.name},
    )


def snapshot_sensor(dataset: DatasetConfig, jobs: dict[str, Any]) -> dg.SensorDefinition:
    """Registers new snapshots as partitions, and runs the jobs of recipes that ask for it on the newest one.

    Args:
        jobs: Recipe name -> job, of the recipes with `retrain.on_new_snapshot`.
    """

    @dg.sensor(
        name=f"{dataset.name}_snapshots",
        jobs=list(jobs.values()) or None,
        minimum_interval_seconds=SENSOR_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=_described(f"Finds new snapshots of {dataset.name}.", dataset.description),
    )
    def _sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from sft_pipeline.stages.raw_rows.locate import snapshots, source_digests

        try:
            found = snapshots(dataset.sources, context.log.warning)
        except InputError as error:
            context.update_cursor(context.cursor or NONE_YET)
            return dg.SkipReason(str(error))
        known = set(context.instance.get_dynamic_partitions(f"{dataset.name}_snapshots"))
        new = [s for s in found if s not in known]
        newest = found[-1] if found else None
        requests = []
        # The first evaluation registers what is there; only a snapshot that arrives later starts runs.
        if newest and context.cursor and (context.cursor == NONE_YET or newest > context.cursor):
            try:
                digest = sha256_json(source_digests(dataset.sources, newest))[:12]
            except InputError as error:  # for example a file that nothing reads: tried again until it is gone
                return dg.SkipReason(str(error))
            requests = [
                dg.RunRequest(job_name=j.name, run_key=f"{j.name}:{newest}:{digest}", partition_key=newest)
                for j in jobs.values()
            ]
        return dg.SensorResult(
            run_requests=requests,
            dynamic_partitions_requests=[partitions_of(dataset).build_add_request(new)] if new else [],
            cursor=newest or context.cursor or NONE_YET,
        )

    return _sensor


def retrain_schedule(dataset: DatasetConfig, recipe: RecipeConfig, job: Any) -> dg.ScheduleDefinition:
    """Runs the recipe's job on the newest registered snapshot; what is unchanged is reused."""

    @dg.schedule(
        name=f"{recipe.name}_schedule",
        job=job,
        cron_schedule=recipe.retrain.cron or "",
        description=f"Retrains {recipe.name} on the newest snapshot.",
    )
    def _schedule(context: dg.ScheduleEvaluationContext) -> Iterator[Any]:
        known = sorted(context.instance.get_dynamic_partitions(f"{dataset.name}_snapshots"))
        if not known:
            yield dg.SkipReason(f"{dataset.name} has no snapshot yet")
            return
        yield dg.RunRequest(run_key=None, partition_key=known[-1])

    return _schedule

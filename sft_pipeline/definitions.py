"""What Dagster loads: one branch per YAML file."""

import warnings

import dagster as dg

from sft_pipeline.config.load import Catalog, load_catalog
from sft_pipeline.orchestration.assets import stage_asset
from sft_pipeline.orchestration.automation import branch_job, retrain_schedule, snapshot_sensor
from sft_pipeline.project import switch_telemetry_off
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import DATASET_STAGES, RECIPE_STAGES


def build_definitions(catalog: Catalog, listener: Reporter | None = None) -> dg.Definitions:
    """The definitions of every dataset and recipe in the catalog.

    Args:
        listener: Gets what the stages report (the terminal of `sft run`).
    """
    listener = listener or Reporter()
    datasets, recipes = catalog.datasets, catalog.recipes
    jobs = {r.name: branch_job(datasets[r.dataset], r) for r in recipes.values()}
    return dg.Definitions(
        assets=[
            *(stage_asset(s, d, None, listener) for d in datasets.values() for s in DATASET_STAGES),
            *(
                stage_asset(s, datasets[r.dataset], r, listener)
                for r in recipes.values()
                for s in RECIPE_STAGES
            ),
        ],
        jobs=list(jobs.values()),
        sensors=[
            snapshot_sensor(
                d,
                {
                    r.name: jobs[r.name]
                    for r in recipes.values()
                    if r.dataset == d.name and r.retrain.on_new_snapshot
                },
            )
            for d in datasets.values()
        ],
        schedules=[
            retrain_schedule(datasets[r.dataset], r, jobs[r.name]) for r in recipes.values() if r.retrain.cron
        ],
        metadata={"problems": "\n".join(catalog.problems.values())} if catalog.problems else None,
    )


def load() -> dg.Definitions:
    """Loads every file; a broken one is reported in the log and leaves the other branches standing."""
    switch_telemetry_off()
    catalog = load_catalog()
    for problem in catalog.problems.values():
        warnings.warn(f"left out: {problem}", stacklevel=2)
    return build_definitions(catalog)


defs = load()

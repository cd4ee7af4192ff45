"""One Dagster asset per stage and branch: it finds the branch, runs the stage, and yields the results."""

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import dagster as dg

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.load import find_recipe, load_catalog
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import BlockedError, InputError, Interrupted, SftError
from sft_pipeline.launch.reaper import WORKER_TAG, process_identity
from sft_pipeline.orchestration.metadata import DagsterReporter, to_metadata
from sft_pipeline.orchestration.tags import is_outside, refuse_code
from sft_pipeline.reporting import Reporter, Tee
from sft_pipeline.secret_text import holds_secret, redacted
from sft_pipeline.stages.code_version import code_version
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.report import read_report
from sft_pipeline.stages.run import Run, StageOutcome, run_stage
from sft_pipeline.stages.stage import Branch, Build, Built, Stage
from sft_pipeline.store import Store
from sft_pipeline.store.files import sha256_json

GPU_POOL = "gpu"
SET_TAG = "sft/set"  # JSON list of "a.b=value": the overrides of this run
RECIPE_TAG = "sft/recipe_source"  # the recipe's name or file, as given to `sft run`
OUTAGE_TAG = "sft/mlflow_outage"
CRASH_RETRIES = 1
DEFAULT_OWNER = "team:sft"


def partitions_of(dataset: DatasetConfig) -> dg.DynamicPartitionsDefinition:
    """The snapshots of a dataset."""
    return dg.DynamicPartitionsDefinition(name=f"{dataset.name}_snapshots")


def stage_asset(
    stage: Stage, dataset: DatasetConfig, recipe: RecipeConfig | None, listener: Reporter
) -> dg.AssetsDefinition:
    """The asset of one stage of one branch.

    Args:
        recipe: None for the dataset's own stages.
        listener: Gets everything the stage reports, beside Dagster's log.
    """
    branch = Branch(dataset, "", recipe)
    key = stage.asset(branch).split("/")
    owner = (recipe.owner if recipe else None) or dataset.owner or DEFAULT_OWNER
    config_digest = sha256_json(stage.config(branch).identity())

    @dg.asset(
        key=key,
        deps=[STAGES[name].asset(branch).split("/") for name in (*stage.inputs, *stage.acceptance)],
        partitions_def=partitions_of(dataset),
        group_name=key[0],
        description=stage.description,
        kinds=set(stage.kinds),
        owners=[owner],
        code_version=f"{code_version(stage.code_package)}-{config_digest[:8]}",
        pool=GPU_POOL if stage.isolated else None,
        check_specs=[
            dg.AssetCheckSpec(c.name, asset=key, description=c.description, blocking=c.blocking)
            for c in stage.checks
        ],
    )
    def materialize(context: dg.AssetExecutionContext) -> Iterator[Any]:
        _tag_worker(context)
        try:
            overridden, run = _run_of(context, recipe, listener)
            outcome = run_stage(stage, STAGES, Branch(dataset, context.partition_key, overridden), run)
        except SftError as error:
            # A crash of the child is tried again, which resumes; what would fail again in the same way is
            # not. A retry policy would also retry a step that somebody interrupted.
            crashed = stage.isolated and not isinstance(error, (InputError, BlockedError, Interrupted))
            cause = None if holds_secret(error) else error
            if crashed and context.retry_number < CRASH_RETRIES:
                context.log.warning(redacted(str(error)))
                raise dg.RetryRequested(max_retries=CRASH_RETRIES) from cause
            metadata = {"exit_code": error.exit_code}
            raise dg.Failure(redacted(str(error)), metadata=metadata, allow_retries=False) from cause
        except Exception as error:
            # Libraries put addresses with passwords into their errors, and Dagster keeps those with their
            # causes and tracebacks.
            if not holds_secret(error):
                raise
            raise dg.Failure(redacted(f"{type(error).__name__}: {error}")) from None
        yield from _results(stage, outcome)

    return materialize


def _tag_worker(context: dg.AssetExecutionContext) -> None:
    """Names the run's process in a tag, so that the reaper finds runs whose process died."""
    parent = multiprocessing.parent_process()
    identity = process_identity(parent.pid if parent and parent.pid else os.getpid())
    if context.run.tags.get(WORKER_TAG) != identity:
        context.instance.add_run_tags(context.run.run_id, {WORKER_TAG: identity})


def _run_of(
    context: dg.AssetExecutionContext, recipe: RecipeConfig | None, listener: Reporter
) -> tuple[RecipeConfig | None, Run]:
    """The recipe with this Dagster run's overrides, and how the stage runs in it."""
    from sft_pipeline.tracking.mlflow import AFTER, MlflowTracker, publish
    from sft_pipeline.tracking.server import GuardedClient

    overrides = json.loads(context.run.tags.get(SET_TAG, "[]"))
    if recipe is not None and overrides:
        catalog, name = load_catalog(), context.run.tags.get(RECIPE_TAG, recipe.name)
        tagged = find_recipe(catalog, name, overrides)
        if tagged != recipe:  # `sft run` has been given the overrides by its caller, not by the tags
            if name not in catalog.recipes and is_outside(name):
                raise InputError(f"the tag {RECIPE_TAG} names a file outside the project ({name})")
            refuse_code(find_recipe(catalog, name), tagged)
        recipe = tagged
    report = Tee(DagsterReporter(context), listener)
    server = GuardedClient(report, AFTER, *_mlflow_outage(context))
    run = Run(
        store=Store(),
        report=report,
        run_id=context.run.run_id,
        earlier_run_ids=tuple(r for r in (context.run.parent_run_id, context.run.root_run_id) if r),
        current=not overrides,
        tracker=MlflowTracker(context.run.run_id, server),
        publish=partial(publish, server=server),
        isolate=lambda stage, build: _isolate(context, stage, build, recipe),
    )
    return recipe, run


def _mlflow_outage(context: dg.AssetExecutionContext) -> tuple[str | None, Callable[[str], None]]:
    """What an earlier step of this run noted of an MLflow server that failed, and how this step notes it.

    In a tag of the run, since steps may be processes of their own. A run that is executed again has the tags
    of the first, hence the run's id in it.
    """
    instance, run_id = context.instance, context.run.run_id
    found = instance.get_run_by_id(run_id)
    noted_by, _, outage = (found.tags if found else {}).get(OUTAGE_TAG, "").partition(" ")
    return (
        outage if noted_by == run_id else None,
        lambda text: instance.add_run_tags(run_id, {OUTAGE_TAG: f"{run_id} {text}"}),
    )


def _isolate(
    context: dg.AssetExecutionContext, stage: Stage, build: Build, recipe: RecipeConfig | None
) -> Built:
    """Runs a build in a supervised child with Dagster Pipes; it ends with this step and the run's worker."""
    from sft_pipeline.launch.launcher import run_isolated

    processes = recipe.training.processes if recipe and stage.name == "trained_checkpoints" else 1
    parent = multiprocessing.parent_process()
    watch = [str(parent.pid)] if parent and parent.pid else []
    # The message reader's count of writers is a preview; nothing here uses it.
    warnings.filterwarnings("ignore", category=dg.PreviewWarning)
    with dg.open_pipes_session(
        context=context,
        context_injector=dg.PipesTempFileContextInjector(),
        message_reader=dg.PipesTempFileMessageReader(),
    ) as session:
        return run_isolated(
            stage, build, processes=processes, watch=watch, extra_env=session.get_bootstrap_env_vars()
        )


def _results(stage: Stage, outcome: StageOutcome) -> Iterator[Any]:
    artifact, manifest = outcome.artifact, outcome.artifact.manifest
    report = read_report(artifact)
    metadata: dict[str, Any] = {
        **to_metadata(report["evidence"], artifact),
        **{f"count/{name}": value for name, value in manifest.counts.items()},
        "cached": outcome.cached,
        "accepted": manifest.accepted,
        "fingerprint": manifest.fingerprint,
        "path": dg.MetadataValue.path(str(artifact.path)),
    }
    if manifest.mlflow_run_id:
        metadata["mlflow_run_id"] = manifest.mlflow_run_id
    yield dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion(manifest.data_version))
    blocking = {c.name: c.blocking for c in stage.checks}
    for check in manifest.checks:
        yield dg.AssetCheckResult(
            check_name=check["name"],
            passed=check["passed"],
            severity=dg.AssetCheckSeverity.ERROR if blocking[check["name"]] else dg.AssetCheckSeverity.WARN,
            description=check["description"],
            metadata=to_metadata(report["checks"].get(check["name"], {}), artifact),
        )

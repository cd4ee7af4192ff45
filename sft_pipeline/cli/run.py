"""`sft run`: a Dagster run of the branch in this process, with progress, and what came of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sft_pipeline.cli.branch import find_branch
from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.cli.fail_fast import refuse_misfits
from sft_pipeline.config.load import Catalog
from sft_pipeline.errors import BlockedError, InputError, Interrupted
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.report import checks_of, failed_blocking
from sft_pipeline.stages.run import needed_for
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import as_disk_error

STATUS_OF_EXIT = {BlockedError.exit_code: "blocked", Interrupted.exit_code: "interrupted"}


@dataclass
class RunResult:
    """What one `sft run` did."""

    status: str
    exit_code: int
    dagster_run_id: str
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def exported_model(self) -> Path | None:
        export = self.artifacts.get("exported_model")
        return export.path if export and export.manifest.accepted else None

    @property
    def metrics(self) -> dict[str, Any]:
        evaluation = self.artifacts.get("evaluation")
        if evaluation is None:
            return {"base": None, "tuned": None}
        result = json.loads(evaluation.file("evaluation.json").read_text())
        return {who: result[who] for who in ("base", "tuned")}

    def to_json(self) -> dict[str, Any]:
        tracked = [a.manifest.mlflow_run_id for a in self.artifacts.values() if a.manifest.mlflow_run_id]
        return {
            "status": self.status,
            "exported_model": str(self.exported_model) if self.exported_model else None,
            "artifacts": {name: str(a.path) for name, a in self.artifacts.items()},
            "cached": self.cached,
            "checks": [c for name, a in self.artifacts.items() for c in checks_of(a, name)],
            "metrics": self.metrics,
            "mlflow_run_id": tracked[-1] if tracked else None,
            "dagster_run_id": self.dagster_run_id,
            "error": self.error,
        }

    def show(self, console: Console) -> None:
        """The result for people: the table of base and tuned, what blocked, and where to look."""
        metrics = self.metrics
        if metrics["base"] and metrics["tuned"]:
            table = Table(title="test split: base against tuned")
            table.add_column("")
            for column in ("base", "tuned", "difference"):
                table.add_column(column, justify="right")
            for name, tuned in metrics["tuned"].items():
                base = metrics["base"].get(name)
                if isinstance(tuned, (int, float)) and isinstance(base, (int, float)):
                    table.add_row(name, f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f}")
            console.print(table)
        console.print(f"status: {self.status}")
        if self.error:
            console.print(self.error, style="red", soft_wrap=True)
        if export := self.exported_model:
            for line in (
                f"exported model: {export}",
                f"  its card:     {export / 'README.md'}",
                f"  its lineage:  sft lineage {export} --verify",
            ):
                console.print(line, soft_wrap=True)
        console.print("look at it: sft ui (Dagster and MLflow)")


def run_recipe(
    recipe: str, *, snapshot: str | None, until: str | None, overrides: Sequence[str], console: Console
) -> RunResult:
    """Materializes a branch, up to the asset `until`.

    Raises:
        InputError: The recipe, dataset, snapshot or asset name is not there.
        Interrupted: The user or a signal stopped the run.
    """
    _, branch = find_branch(recipe, snapshot, overrides, console)
    last = until or list(STAGES)[-1]
    if last not in STAGES:
        raise InputError(f"--until {last}: no such asset; take one of {', '.join(STAGES)}")
    if "sanity_check" in needed_for(last, STAGES):
        refuse_misfits(branch.require_recipe())
    Store().sweep()

    # Importing Dagster takes a second: a mistake above is reported before.
    import dagster as dg

    from sft_pipeline.definitions import build_definitions
    from sft_pipeline.launch.reaper import reap_dead_runs
    from sft_pipeline.orchestration.assets import RECIPE_TAG, SET_TAG, partitions_of
    from sft_pipeline.orchestration.instance import open_instance

    config = branch.require_recipe()
    catalog = Catalog(datasets={branch.dataset.name: branch.dataset}, recipes={config.name: config})
    tags = {RECIPE_TAG: recipe} | ({SET_TAG: json.dumps(list(overrides))} if overrides else {})
    with ConsoleReporter(console) as reporter, open_instance() as instance:
        for message in reap_dead_runs(instance):
            reporter.log(message, "warning")
        instance.add_dynamic_partitions(partitions_of(branch.dataset).name or "", [branch.snapshot])
        job = build_definitions(catalog, reporter).resolve_job_def(f"{config.name}_job")
        try:
            result = job.execute_in_process(
                instance=instance,
                partition_key=branch.snapshot,
                asset_selection=[
                    dg.AssetKey(STAGES[name].asset(branch).split("/")) for name in needed_for(last, STAGES)
                ],
                tags=tags,
                raise_on_error=False,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            raise Interrupted("interrupted; run the same command again to go on") from None
    return _result(result, last)


def _result(result: Any, last: str) -> RunResult:
    """What the events of a Dagster run say of it."""
    artifacts: dict[str, Artifact] = {}
    cached: list[str] = []
    failures = []
    for event in result.all_events:
        if event.event_type_value == "ASSET_MATERIALIZATION":
            materialization = event.event_specific_data.materialization
            name = materialization.asset_key.path[-1]
            artifacts[name] = Artifact(Path(materialization.metadata["path"].value))
            if materialization.metadata["cached"].value:
                cached.append(name)
        elif event.event_type_value == "STEP_FAILURE":
            failures.append(event.event_specific_data)
    blocked = failed_blocking(list(artifacts.values()))
    error: str | None = None
    if blocked:
        code, error = BlockedError.exit_code, "stopped by a blocking check: " + "; ".join(blocked)
    elif not result.success:
        code, error = _explain(failures)
    else:
        code = 0
    done = "exported" if last == "exported_model" else "materialized"
    return RunResult(
        STATUS_OF_EXIT.get(code, "failed") if code else done, code, result.run_id, artifacts, cached, error
    )


def _explain(failures: list[Any]) -> tuple[int, str]:
    """The exit code and message of the first failure that is not a mere consequence of another."""
    for failure in failures:
        data = failure.user_failure_data
        if data is not None and "exit_code" in data.metadata:
            return int(data.metadata["exit_code"].value), data.description or "failed"
    if failures and failures[0].error:
        error = failures[0].error
        cause = error.cause or error
        if "DagsterExecutionInterruptedError" in (error.cls_name, cause.cls_name):
            return Interrupted.exit_code, "interrupted; run the same command again to go on"
        if clear := as_disk_error(Exception(cause.message), "running"):
            return clear.exit_code, str(clear)
        return 1, f"unexpected {cause.cls_name}: {cause.message.strip()}"
    return 1, "the run failed; see `sft ui`"

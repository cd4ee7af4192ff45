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
from sft_pipeline.errors import InputError, Interrupted
from sft_pipeline.reporting import Tee
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import checks_of, failed_blocking, needed_for
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.until import Ahead
from sft_pipeline.store import Artifact, Store

EXIT_CODES = {"exported": 0, "materialized": 0, "failed": 1, "blocked": 3, "interrupted": 4}


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
            table = Table(title="test side: base against tuned")
            for column, justify in (
                ("", "left"),
                ("base", "right"),
                ("tuned", "right"),
                ("difference", "right"),
            ):
                table.add_column(column, justify=justify)  # type: ignore[arg-type]
            for name, tuned in metrics["tuned"].items():
                base = metrics["base"].get(name)
                if isinstance(tuned, (int, float)) and isinstance(base, (int, float)):
                    table.add_row(name, f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f}")
            console.print(table)
        console.print(f"status: {self.status}")
        if self.error:
            console.print(self.error, style="red", markup=False, soft_wrap=True)
        if self.exported_model:
            console.print(f"exported model: {self.exported_model}", soft_wrap=True, markup=False)
            console.print(
                f"  its card:     {self.exported_model / 'README.md'}", soft_wrap=True, markup=False
            )
            console.print(
                f"  its lineage:  sft lineage {self.exported_model} --verify", soft_wrap=True, markup=False
            )
        console.print("look at it: sft ui (Dagster and MLflow)")


def run_recipe(
    recipe: str, *, snapshot: str | None, until: str | None, overrides: Sequence[str], console: Console
) -> RunResult:
    """Materializes a branch.

    Raises:
        InputError: The recipe, dataset, snapshot or asset name is not there.
    """
    _, branch = find_branch(recipe, snapshot, overrides)
    last = until or list(STAGES)[-1]
    if last not in STAGES:
        raise InputError(f"--until {last}: no such asset; take one of {', '.join(STAGES)}")
    Store().sweep()
    with ConsoleReporter(console) as reporter:
        return _execute(recipe, branch, last, overrides, reporter)


def _execute(
    recipe_argument: str, branch: Branch, last: str, overrides: Sequence[str], reporter: ConsoleReporter
) -> RunResult:
    import dagster as dg

    from sft_pipeline.config.load import Catalog
    from sft_pipeline.definitions import build_definitions
    from sft_pipeline.launch.reaper import reap_dead_runs
    from sft_pipeline.orchestration.assets import RECIPE_TAG, SET_TAG, partitions_of

    recipe, names = branch.the_recipe(), needed_for(last, STAGES)
    definitions = build_definitions(
        Catalog(datasets={branch.dataset.name: branch.dataset}, recipes={recipe.name: recipe}),
        Tee(reporter, Ahead([STAGES[name] for name in names], branch, Store())),
    )
    with dg.DagsterInstance.get() as instance:
        for message in reap_dead_runs(instance):
            reporter.log(message, "warning")
        instance.add_dynamic_partitions(partitions_of(branch.dataset).name or "", [branch.snapshot])
        keys = [dg.AssetKey(STAGES[name].asset(branch).split("/")) for name in names]
        tags = {RECIPE_TAG: recipe_argument}
        if overrides:
            tags[SET_TAG] = json.dumps(list(overrides))
        job = definitions.resolve_job_def(f"{recipe.name}_job")
        try:
            result = job.execute_in_process(
                instance=instance,
                partition_key=branch.snapshot,
                asset_selection=keys,
                tags=tags,
                raise_on_error=False,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            raise Interrupted("interrupted; run the same command again to go on") from None
    return _result(result, branch, last)


def _result(result: Any, branch: Branch, last: str) -> RunResult:
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
    if result.success and not blocked:
        status = "exported" if last == "exported_model" else "materialized"
        return RunResult(status, 0, result.run_id, artifacts, cached)
    if blocked:
        return RunResult(
            "blocked",
            3,
            result.run_id,
            artifacts,
            cached,
            "stopped by a blocking check: " + "; ".join(blocked),
        )
    code, message = _explain(failures)
    status = {3: "blocked", 4: "interrupted"}.get(code, "failed")
    return RunResult(status, code, result.run_id, artifacts, cached, message)


def _explain(failures: list[Any]) -> tuple[int, str]:
    """The exit code and message of the first failure that is not a mere consequence of another."""
    for failure in failures:
        told = failure.user_failure_data
        if told is not None and "exit_code" in told.metadata:
            return int(told.metadata["exit_code"].value), told.description or "failed"
    if failures and failures[0].error:
        error = failures[0].error
        cause = error.cause or error
        if "DagsterExecutionInterruptedError" in (error.cls_name, cause.cls_name):
            return Interrupted.exit_code, "interrupted; run the same command again to go on"
        return 1, f"unexpected {cause.cls_name}: {cause.message.strip()}"
    return 1, "the run failed; see `sft ui`"

"""Artifacts of a branch as its stages would leave them, and what is told of them to MLflow."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Artifact, Store

RANK = {"graders": [{"name": "right", "kind": "exact_match"}], "rank_by": ["right"]}
BRANCH = Branch(
    DatasetConfig(name="d", sources=[{"path": "rows"}]),
    "s1",
    RecipeConfig(name="r", dataset="d", model={"base": "m"}, evaluation=RANK),
)


def put(
    store: Store,
    asset: str,
    fingerprint: str,
    inputs: dict[str, Artifact],
    write=lambda folder: None,
    snapshot: str = "s1",
    **fields: Any,
) -> Artifact:
    with store.building(fingerprint) as folder:
        write(folder)
        return store.commit(
            folder,
            volatile=(),
            fields={
                "asset": asset,
                "partition": snapshot,
                "code_version": "c",
                "config": {},
                "accepted": True,
                "counts": {},
                "environment": {},
                "inputs": {n: a.as_input() for n, a in inputs.items()},
                **fields,
            },
        )


class Heard(Reporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def log(self, message: str, level: str = "info") -> None:
        if level != "info":
            self.warnings.append(message)


def track(
    stage: str, fingerprint: str, inputs: dict[str, Artifact], server: Any = None, branch: Branch = BRANCH
):
    from sft_pipeline.tracking.mlflow import MlflowTracker

    return MlflowTracker("dagster-run", server)(STAGES[stage], branch, fingerprint, inputs, Reporter())


def evaluation(
    store: Store,
    name: str,
    training: Artifact,
    scores: dict[str, float],
    losses: dict[str, float] | None = None,
    template: str = "chatml",
    **fields: Any,
) -> Artifact:
    """An evaluation: the scores by test group, the loss by test row, and the template of the rows.

    Args:
        fields: Of its manifest.
    """

    def write(folder: Path) -> None:
        mean = sum(scores.values()) / len(scores)
        (folder / "evaluation.json").write_text(
            json.dumps(
                {
                    "chosen_step": 10,
                    "base": {"right": 0.0, "test_loss": 3.0},
                    "tuned": {"right": mean, "test_loss": 1.0},
                    "checkpoints": [{"step": 10, "right": mean, "val_loss": 1.0}],
                }
            )
        )
        rows = [
            {"side": "test", "step": step, "group": g, "right": v if step == "10" else 0.0}
            for g, v in scores.items()
            for step in ("base", "10")
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "samples.parquet")
        judged = [{"row_id": row, "tuned": 4 * loss, "weight": 4.0} for row, loss in (losses or {}).items()]
        columns = pa.schema([("row_id", pa.string()), ("tuned", pa.float64()), ("weight", pa.float64())])
        pq.write_table(pa.Table.from_pylist(judged, columns), folder / "test_losses.parquet")

    def write_formatting(folder: Path) -> None:
        made_with = {"template_sha256": template, "tokenizer_sha256": "k", "mask_sha256": "m"}
        (folder / "formatting.json").write_text(json.dumps(made_with | {"name": name}))

    tokenized = put(store, "r/tokenized_rows", name[:-1] + "f", {}, write_formatting)
    inputs = {"trained_checkpoints": training, "tokenized_rows": tokenized}
    return put(store, "r/evaluation", name, inputs, write, **fields)


def export(store: Store, name: str, *scores: Any, **more: Any) -> Artifact:
    """An export of a training that was judged so, as `evaluation` takes it."""
    training = put(store, "r/trained_checkpoints", name * 63 + "a", {})
    judged = evaluation(store, name * 63 + "b", training, *scores, **more)
    return put(
        store,
        "r/exported_model",
        name * 63 + "c",
        {"trained_checkpoints": training, "evaluation": judged},
        lambda f: (f / "README.md").write_text("card"),
    )


def ranked_by(term: str) -> Branch:
    recipe = BRANCH.require_recipe()
    return replace(
        BRANCH,
        recipe=recipe.model_copy(
            update={"evaluation": recipe.evaluation.model_copy(update={"rank_by": [term]})}
        ),
    )


def register(
    artifact: Artifact, *, branch: Branch = BRANCH, current: bool = True, report: Reporter | None = None
) -> None:
    from sft_pipeline.tracking.mlflow import publish

    publish(artifact, branch, Run(Store(), report or Reporter(), current=current))


def champion(client: Any) -> str:
    return str(client.get_model_version_by_alias("r", "champion").version)


def decision(client: Any, version: str) -> str:
    return client.get_model_version("r", version).tags["sft.champion_decision"]

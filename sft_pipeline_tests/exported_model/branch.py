"""A branch of a world up to its export."""

from pathlib import Path
from typing import Any

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.build import build as evaluate
from sft_pipeline.stages.evaluation.config import EvaluationStageConfig
from sft_pipeline.stages.exported_model.build import build
from sft_pipeline.stages.exported_model.config import ExportedModelConfig
from sft_pipeline.stages.stage import Built, Check
from sft_pipeline.store import Artifact
from sft_pipeline.training.config import ModelConfig
from sft_pipeline_tests.evaluation import world as w

GRADERS = [{"name": "format_pass_rate", "kind": "regex", "pattern": "decision"}]
LORA = ModelConfig.model_validate(
    {"base": "base", "parameterization": "lora", "lora": {"r": 4, "alpha": 8, "dropout": 0.0}}
)


def inputs_for(
    project: w.World, split: Artifact, model: ModelConfig, name: str, *, passes: int = 0, **template: Any
) -> dict[str, Artifact]:
    """Everything before the export: {stage name: artifact}. The model has trained for so many passes over the
    rows; without any, its adapter is random."""
    world = w.World(project.root / name, project.store)
    world.root.mkdir()
    (world.root / "base").symlink_to(project.root / "base")
    rows = w.tokenized(world, split, owner=name, **template)
    trained = w.checkpoints(world, rows, model, {7: passes}, learn=passes > 0)
    settings = EvaluationStageConfig.model_validate(
        {
            "model": model.model_dump(),
            "evaluation": {"graders": GRADERS, "require_improvement": False, "max_new_tokens": 12},
        }
    )
    built, out = world.build(
        evaluate, "evaluation", settings, {"tokenized_rows": rows, "trained_checkpoints": trained}
    )
    evaluated = world.artifact(
        "evaluation", name, out, inputs={"tokenized_rows": rows, "trained_checkpoints": trained}, built=built
    )
    return {
        "grouped_split": split,
        "tokenized_rows": rows,
        "trained_checkpoints": trained,
        "evaluation": evaluated,
    }


def export(
    project: w.World, inputs: dict[str, Artifact], model: ModelConfig, **settings: Any
) -> tuple[dict[str, Check], Built, Path]:
    config = ExportedModelConfig.model_validate(
        {"export": settings, "model": model.model_dump(), "recipe": "recipe", "dataset": "dataset"}
    )
    built, out = project.build(build, "exported_model", config, inputs, Reporter())
    return {c.name: c for c in built.checks}, built, out

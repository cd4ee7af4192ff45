"""The asset `trained_checkpoints`: checkpoints of one training, all of them resumable, and its curves."""

from sft_pipeline.external_files import digest_model
from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig


def _config(branch: Branch) -> TrainedCheckpointsConfig:
    recipe = branch.require_recipe()
    return TrainedCheckpointsConfig(model=recipe.model, training=recipe.training)


def _outside(branch: Branch) -> dict[str, str]:
    recipe = branch.require_recipe()
    return digest_model(recipe.model.base, recipe.tokenizer)


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.trained_checkpoints.build import build

    return build


STAGE = Stage(
    name="trained_checkpoints",
    description=(
        "TRL's SFTTrainer over the update plan: loss at supervised positions only, atomic resumable "
        "checkpoints, curves, samples, a diagnosis in words."
    ),
    kinds=frozenset({"pytorch", "huggingface"}),
    inputs=("tokenized_rows", "packed_shards"),
    acceptance=("sanity_check",),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec(
            "finite_loss",
            True,
            "No update had a loss or gradient that is NaN or infinite; in fp16 some gradients may overflow, "
            "but not all.",
        ),
        CheckSpec(
            "checkpoints_resumable", True, "Every checkpoint has all required items, and their hashes hold."
        ),
        CheckSpec(
            "budget_as_planned",
            True,
            "Updates, examples and supervised tokens consumed are those of the plan.",
        ),
        CheckSpec(
            "diagnosis", False, "The curves show no stalled, diverging or spiking loss and no overfitting."
        ),
    ),
    outside=_outside,
    packages=("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "numpy"),
    isolated=True,
)

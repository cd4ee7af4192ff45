"""The asset `evaluation`: every checkpoint judged on held-out behaviour, the best compared with the base."""

from sft_pipeline.external_files import digest_model
from sft_pipeline.graders.sources import digest_graders
from sft_pipeline.stages.evaluation.config import EvaluationStageConfig
from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage


def _config(branch: Branch) -> EvaluationStageConfig:
    recipe = branch.require_recipe()
    return EvaluationStageConfig(evaluation=recipe.evaluation, model=recipe.model)


def _outside(branch: Branch) -> dict[str, str]:
    recipe = branch.require_recipe()
    return digest_model(recipe.model.base, recipe.tokenizer) | digest_graders(recipe.evaluation.graders)


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.evaluation.build import build

    return build


STAGE = Stage(
    name="evaluation",
    description=(
        "Every checkpoint generates replies to held-out prompts, and graders score them; gates and ranking "
        "choose; the chosen one is compared with the base once, on the test split."
    ),
    kinds=frozenset({"pytorch", "python"}),
    inputs=("tokenized_rows", "trained_checkpoints"),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec(
            "judged_is_trained",
            True,
            "Each checkpoint's validation loss is the one that training recorded for it.",
        ),
        CheckSpec("gates_passed", True, "The chosen checkpoint passes every gate on the validation split."),
        CheckSpec(
            "improvement",
            True,
            "On the test split the chosen checkpoint beats the base in the first ranking term, strictly.",
        ),
        CheckSpec(
            "selection_explained",
            False,
            "Why this checkpoint was chosen, and whether the lowest loss would have chosen another.",
        ),
        CheckSpec("replies_end", False, "Few replies of the tuned model are cut at max_new_tokens."),
    ),
    outside=_outside,
    packages=("torch", "transformers", "peft", "tokenizers", "jsonschema", "numpy"),
    isolated=True,
)

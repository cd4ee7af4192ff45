"""The asset `sanity_check`: what must hold before training begins."""

from sft_pipeline.external_files import digest_files, digest_model
from sft_pipeline.graders.sources import digest_graders
from sft_pipeline.stages.sanity_check.checks import CHECKS
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.stage import Branch, BuildFunction, Stage
from sft_pipeline.text.config import NAMED_TEMPLATES


def _config(branch: Branch) -> SanityCheckConfig:
    recipe = branch.require_recipe()
    return SanityCheckConfig(
        sanity=recipe.sanity,
        model=recipe.model,
        training=recipe.training,
        export=recipe.export,
        evaluation=recipe.evaluation,
        tokenizer=recipe.tokenizer,
        tokenizer_revision=recipe.model.revision,
        template=recipe.template.model_dump(mode="json"),
        tokens=recipe.tokens.model_dump(mode="json"),
    )


def _outside(branch: Branch) -> dict[str, str]:
    recipe = branch.require_recipe()
    found = digest_model(recipe.model.base, recipe.tokenizer) | digest_graders(recipe.evaluation.graders)
    template = recipe.template.chat_template
    return found if template == "tokenizer" or template in NAMED_TEMPLATES else found | digest_files(template)


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.sanity_check.build import build

    return build


STAGE = Stage(
    name="sanity_check",
    description=(
        "Before training: boundary probe on the real model, overfitting a few rows, a short run with "
        "evaluations, sample generations, labels and vocabulary, graders on a few rows, and an export of the "
        "short run's model."
    ),
    kinds=frozenset({"pytorch"}),
    inputs=("tokenized_rows", "packed_shards"),
    config=_config,
    load_build=_load_build,
    checks=CHECKS,
    outside=_outside,
    packages=("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "numpy", "jsonschema"),
    isolated=True,
    reuse_unaccepted=False,
)

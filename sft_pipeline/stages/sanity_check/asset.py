"""The asset `sanity_check`: what must hold before training begins."""

from sft_pipeline.external_files import digest_files, digest_model
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.stage import Branch, Build, Built, CheckSpec, Stage
from sft_pipeline.text.config import NAMED_TEMPLATES


def _config(branch: Branch) -> SanityCheckConfig:
    recipe = branch.require_recipe()
    return SanityCheckConfig(
        sanity=recipe.sanity,
        model=recipe.model,
        training=recipe.training,
        tokenizer=recipe.tokenizer,
        tokenizer_revision=recipe.model.revision,
        template=recipe.template.model_dump(mode="json"),
        tokens=recipe.tokens.model_dump(mode="json"),
    )


def _outside(branch: Branch) -> dict[str, str]:
    recipe = branch.require_recipe()
    found = digest_model(recipe.model.base, recipe.tokenizer)
    template = recipe.template.chat_template
    return found if template == "tokenizer" or template in NAMED_TEMPLATES else found | digest_files(template)


def _build(build: Build) -> Built:
    from sft_pipeline.stages.sanity_check.build import build as build_sanity_check

    return build_sanity_check(build)


STAGE = Stage(
    name="sanity_check",
    description=(
        "Before training: boundary probe on the real model, overfitting a few rows, a short run with "
        "evaluations, sample generations, labels and vocabulary."
    ),
    kinds=frozenset({"pytorch"}),
    inputs=("tokenized_rows", "packed_shards"),
    config=_config,
    build=_build,
    checks=(
        CheckSpec(
            "ids_in_vocabulary",
            True,
            "Every id is inside the model's vocabulary, and blocks fit its positions.",
        ),
        CheckSpec(
            "labels_match",
            True,
            "Labels equal input ids wherever supervised; template and tokenizer are those of the rows.",
        ),
        CheckSpec(
            "boundaries",
            True,
            "No example of a block sees another: changing one moves no other's predictions, "
            "and packed loss equals unpacked loss.",
        ),
        CheckSpec("overfits", True, "A throw-away copy of the model can overfit a few rows."),
        CheckSpec(
            "short_run_stable",
            True,
            "A short run at the recipe's own learning rate neither diverges nor oscillates nor meets a NaN.",
        ),
        CheckSpec("samples", False, "After the short run the model says something, and ends."),
    ),
    outside=_outside,
    packages=("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "numpy"),
    isolated=True,
    reuse_unaccepted=False,
)

# Those that depend on data and model alone, and on nothing of how the model is trained.
PROBE_CHECKS = tuple(c for c in STAGE.checks if c.name in ("ids_in_vocabulary", "labels_match", "boundaries"))

"""The asset `exported_model`: a servable model, proved to be the one that was judged."""

from sft_pipeline.external_files import digest_model
from sft_pipeline.stages.exported_model.config import ExportedModelConfig
from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage


def _config(branch: Branch) -> ExportedModelConfig:
    recipe = branch.require_recipe()
    return ExportedModelConfig(
        export=recipe.export, model=recipe.model, recipe=recipe.name, dataset=recipe.dataset
    )


def _outside(branch: Branch) -> dict[str, str]:
    recipe = branch.require_recipe()
    return digest_model(recipe.model.base, recipe.tokenizer)


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.exported_model.build import build

    return build


STAGE = Stage(
    name="exported_model",
    description=(
        "Adapter, merged weights, tokenizer, chat template, generation config, model card and lineage; "
        "safetensors only."
    ),
    kinds=frozenset({"pytorch", "safetensors"}),
    inputs=("grouped_split", "tokenized_rows", "trained_checkpoints", "evaluation"),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec(
            "merged_equals_adapter",
            True,
            "The exported weights, loaded again, give the logits of base and adapter, up to rounding.",
        ),
        CheckSpec(
            "reload_answers_equal",
            True,
            "Loaded with AutoModelForCausalLM and AutoTokenizer, the export gives the same greedy answers.",
        ),
        CheckSpec(
            "served_prompt_equal",
            True,
            "The exported tokenizer and template turn messages into exactly the prompt ids of training.",
        ),
        CheckSpec("safetensors_only", True, "No weights in a format that can run code."),
        CheckSpec("no_machine_paths", True, "No exported file names a folder of this machine."),
    ),
    outside=_outside,
    packages=("torch", "transformers", "peft", "safetensors", "tokenizers", "huggingface-hub"),
    isolated=True,
)

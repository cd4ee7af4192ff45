"""What can be known of a recipe before any data is built: what would fail at the end fails in a second."""

import json
from typing import Any

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.training.base import base_folder
from sft_pipeline.training.reporters import require_reporters


def refuse_misfits(recipe: RecipeConfig) -> None:
    """Looks at base, tokenizer, template, positions and reporters; loads no weight.

    Raises:
        InputError: One of them is not there, or they do not fit each other.
    """
    from sft_pipeline.text.find_template import load_template
    from sft_pipeline.text.tokenizer import load_tokenizer

    require_reporters(recipe.training)
    folder = base_folder(recipe.model)
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.model.revision)
    load_template(recipe.template.chat_template, tokenizer, recipe.template.variables)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers says it better
    if problems := misfits(recipe, described, tokenizer.vocab_size):
        raise InputError("; ".join(problems))


def misfits(recipe: RecipeConfig, described: dict[str, Any], vocabulary: int | None) -> list[str]:
    """Where tokenizer, context and model do not fit each other.

    Args:
        described: The base's config.json.
        vocabulary: Tokens of the tokenizer.
    """
    model = {**described, **described.get("text_config", {})}
    found = []
    size = model.get("vocab_size")
    if size and vocabulary and vocabulary > size:
        found.append(
            f"the tokenizer {recipe.tokenizer} has {vocabulary} tokens, the model {recipe.model.base} only "
            f"{size}: its ids would fall outside. Take the model's own tokenizer"
        )
    positions = model.get("max_position_embeddings")
    if positions and recipe.tokens.max_length > positions:
        found.append(
            f"tokens.max_length is {recipe.tokens.max_length}, the model has {positions} positions: "
            f"lower it to {positions} at most"
        )
    return found

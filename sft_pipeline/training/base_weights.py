"""Every tensor of the base is loaded from its files: none missing, none left over; and adapters fit it.

transformers fills what it does not find with random numbers, other ones at every load, and says so only in
its log. A model with such a layer trains, is judged and exported, as a mixture of the base and of noise.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.hub import clear_loading_errors
from sft_pipeline.training.adapters import add_adapter, refuse_own_linear_layers
from sft_pipeline.training.base import base_folder
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.process import disable_progress_bars

NAMED = 5  # keys that a message names


def check_base(config: ModelConfig) -> None:
    """Compares the names and shapes in the base's files with those of its architecture, and puts the adapters
    on it; reads no weight.

    Raises:
        InputError: A tensor is missing, left over, or of another shape, or the adapters do not fit.
    """
    from transformers import AutoModelForCausalLM

    disable_progress_bars()
    folder = base_folder(config)
    with clear_loading_errors(f"model.base {config.base}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            device_map="meta",
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    refuse_other_weights(config.base, loaded[1])
    if config.parameterization == "qlora":
        refuse_own_linear_layers(config.base, loaded[0])
    if config.parameterization != "full":
        add_adapter(loaded[0], config.model_copy(update={"parameterization": "lora"}))


def refuse_other_weights(base: str, info: Mapping[str, Any]) -> None:
    """Raises where loading found other tensors than the architecture has.

    Args:
        info: The loading info of `from_pretrained`.

    Raises:
        InputError: Names them.
    """
    found = [
        f"{len(keys)} tensors are {what} ({_named(keys)})"
        for what, keys in (
            ("missing, and would be random numbers", info["missing_keys"]),
            ("left over", info["unexpected_keys"]),
            ("of another shape", [key for key, *_ in info["mismatched_keys"]]),
        )
        if keys
    ]
    if found:
        raise InputError(
            f"model.base {base}: its files do not hold the model that its config.json describes: "
            f"{'; '.join(found)}. A wrapper's prefix (module., model.), a head of another task or an "
            "incomplete copy look like this: save the model again with save_pretrained, or take another base"
        )


def _named(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:NAMED]) + (", ..." if len(keys) > NAMED else "")

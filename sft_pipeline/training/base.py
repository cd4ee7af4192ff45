"""Where the base model and its tokenizer are. Light: no torch, no weight is read."""

import json
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import ADAPTER_CONFIG, HUB_MODEL_FILES
from sft_pipeline.hub import clear_loading_errors, local_folder
from sft_pipeline.training.config import ModelConfig


def base_folder(config: ModelConfig) -> Path:
    """The base model's folder: local, or the hub's at a pinned commit, fetched once into the hub's cache.

    Raises:
        InputError: There is no such folder and it is no hub id, the hub id has no pinned commit, the hub
            cannot be reached, or an adapter lies beside the model.
    """
    files = (*HUB_MODEL_FILES, "*.py") if config.trust_remote_code else HUB_MODEL_FILES
    folder = local_folder(config.base, config.revision, key="model.base", patterns=files)
    if not (folder / "config.json").is_file():
        raise InputError(f"model.base {config.base}: {folder} has no config.json, so it is no model folder")
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(
            f"model.base {config.base}: {folder} has {ADAPTER_CONFIG} beside config.json, and transformers "
            "would put that adapter on the model wherever it is loaded. Move the adapter away, or take the "
            "merged model"
        )
    _refuse_quantized(config.base, folder)
    return folder


def _refuse_quantized(base: str, folder: Path) -> None:
    """Raises where the base's weights are already quantized: nothing exact could be merged into them."""
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers says it better
    if not isinstance(described, dict):
        raise InputError(f"model.base {base}: {folder / 'config.json'} is not a JSON object")
    for part in (described, *(v for v in described.values() if isinstance(v, dict))):
        if quantization := part.get("quantization_config"):
            named = quantization.get("quant_method") if isinstance(quantization, dict) else None
            method = named or "by an unnamed method"
            raise InputError(
                f"model.base {base}: its weights are already quantized ({method}), so that they cannot be "
                "trained, nor an adapter be merged into them exactly. Take the model they were made from; "
                "parameterization qlora quantizes it to 4 bits while loading. Where there is only this one, "
                "load it in transformers, call dequantize() and save_pretrained, and take that folder"
            )


def load_model_config(config: ModelConfig) -> Any:
    """The base's transformers configuration.

    Raises:
        InputError: Unknown or unreachable base.
    """
    from transformers import AutoConfig

    folder = base_folder(config)
    with clear_loading_errors(f"model.base {config.base}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def load_tokenizer(config: ModelConfig) -> Any:
    """The recipe's tokenizer: its own (a hub id may be pinned as owner/name@commit), or the base's.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    if config.tokenizer is None:
        folder = base_folder(config)
    else:
        folder = local_folder(
            config.tokenizer, config.revision, key="model.tokenizer", patterns=HUB_MODEL_FILES
        )
    with clear_loading_errors(f"the tokenizer {config.tokenizer or config.base}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)

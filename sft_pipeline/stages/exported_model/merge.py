"""Writes weights and tokenizer: the base in fp32, the adapter merged, then cast once.

A QLoRA adapter is merged into the base itself, not into its 4-bit form: `merge_and_unload` on a 4-bit model
gives wrong logits (Dettmers et al. 2023 train through the quantized weights but ship the adapter).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.external_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sft_pipeline.project import project_path
from sft_pipeline.text.exported_tokenizer import write_sorted_json
from sft_pipeline.training.base import load_model_config
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.model import load_for_inference

_GENERATION_KEYS_KEPT = ("bos_token_id", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens")


def unquantized(config: ModelConfig) -> ModelConfig:
    """The same model with its base as it is, and the attention that this machine has."""
    parameterization = "lora" if config.parameterization == "qlora" else config.parameterization
    return config.model_copy(update={"parameterization": parameterization, "attention": "auto"})


def load_exact(config: ModelConfig, checkpoint: Path) -> Any:
    """The checkpoint's model in fp32: base and adapter apart, or the whole weights."""
    return load_for_inference(unquantized(config), checkpoint, dtype=torch.float32)


def merge_adapter(model: Any) -> Any:
    """Base and adapter as one; the adapter's model is used up. Whole weights are returned as they are."""
    return model.merge_and_unload(safe_merge=True) if hasattr(model, "peft_config") else model


def target_dtype(name: str, config: ModelConfig) -> torch.dtype:
    """The dtype of the exported weights; `auto` is the base's own, or fp32 where it does not say."""
    if name == "auto":
        # transformers gives a torch.dtype, or the name that is in config.json.
        name = str(getattr(load_model_config(config), "dtype", None)).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def public_name(base: str) -> str:
    """The base's name outside this machine: a hub id or a relative path stays, else the folder's name."""
    path = Path(base).expanduser()
    return path.name if path.is_absolute() or ".." in path.parts else base


def write_adapter(checkpoint: Path, folder: Path, config: ModelConfig) -> None:
    """Copies the adapter's weights and its configuration, naming the base without a machine path."""
    folder.mkdir(parents=True)
    shutil.copyfile(checkpoint / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    data = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    data["base_model_name_or_path"] = public_name(config.base)
    data["revision"] = config.revision
    data["inference_mode"] = True
    write_sorted_json(folder / ADAPTER_CONFIG, data)


def write_merged(
    model: Any,
    folder: Path,
    config: ModelConfig,
    *,
    stop_ids: list[int],
    pad_id: int,
    decoding: dict[str, Any],
) -> None:
    """Saves whole weights as safetensors, with a generation config that stops, and decodes, as the evaluation
    did.

    A local base's own modelling code, which its configuration refers to, is copied beside them.

    Args:
        stop_ids: What ends a reply.
        decoding: temperature (0: greedy) and top_p.
    """
    from transformers import GenerationConfig

    model.config.use_cache = True  # training switches it off, and would have it off for every server
    text_config = model.config.get_text_config()
    text_config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    text_config.pad_token_id = pad_id
    sampling = decoding["temperature"] > 0
    own = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    model.generation_config = GenerationConfig(
        **{k: own[k] for k in _GENERATION_KEYS_KEPT if k in own},
        eos_token_id=stop_ids,
        pad_token_id=pad_id,
        do_sample=sampling,
        **({"temperature": decoding["temperature"], "top_p": decoding["top_p"]} if sampling else {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    for path in (folder / "config.json", folder / "generation_config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        data.pop("_name_or_path", None)
        write_sorted_json(path, data)
    base = project_path(config.base)
    if config.trust_remote_code and base.is_dir():
        for path in sorted(base.glob("*.py")):
            shutil.copyfile(path, folder / path.name)

"""From a checkpoint to weights that need no PEFT: the base in fp32, the adapter merged, then cast once.

A QLoRA adapter is merged into the base itself, not into its 4-bit form: `merge_and_unload` on a 4-bit model gives
wrong logits (Dettmers et al. 2023 train through the quantized weights but ship the adapter).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.project import project_path
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.model import load_for_inference, load_model_config

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def has_adapter(checkpoint: Path) -> bool:
    return (checkpoint / ADAPTER_CONFIG).is_file()


def unquantized(config: ModelConfig) -> ModelConfig:
    """The same model with its base as it is, and the attention that this machine has."""
    parameterization = "lora" if config.parameterization == "qlora" else config.parameterization
    return config.model_copy(update={"parameterization": parameterization, "attention": "auto"})


def load_exact(config: ModelConfig, checkpoint: Path) -> Any:
    """The checkpoint's model in fp32: base and adapter apart, or the whole weights."""
    return load_for_inference(unquantized(config), checkpoint, dtype=torch.float32)


def merge(model: Any) -> Any:
    """Base and adapter as one; the adapter's model is used up. Whole weights are returned as they are."""
    return model.merge_and_unload(safe_merge=True) if hasattr(model, "peft_config") else model


def target_dtype(asked: str, config: ModelConfig) -> torch.dtype:
    """The dtype of the exported weights; `auto` is the base's own."""
    if asked != "auto":
        return DTYPES[asked]
    own = getattr(load_model_config(config), "dtype", None)
    if isinstance(own, str):
        own = DTYPES.get(own.removeprefix("torch."))
    return own if isinstance(own, torch.dtype) else torch.float32


def public_name(base: str) -> str:
    """The base as it may be named outside this machine: a hub id or a relative path as it is, else the folder's name."""
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
    _write_json(folder / ADAPTER_CONFIG, data)


def write_merged(
    model: Any, folder: Path, *, stop_ids: list[int], pad_id: int, decoding: dict[str, Any]
) -> None:
    """Saves whole weights as safetensors, with a generation config that stops, and decodes, as the evaluation did.

    Args:
        stop_ids: What ends a reply.
        decoding: temperature (0: greedy) and top_p.
    """
    from transformers import GenerationConfig

    model.config.use_cache = True  # training switches it off, and would have it off for every server
    for name, value in (
        ("eos_token_id", stop_ids[0] if len(stop_ids) == 1 else stop_ids),
        ("pad_token_id", pad_id),
    ):
        setattr(model.config.get_text_config(), name, value)
    sampling = decoding["temperature"] > 0
    own = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    kept = {
        k: v
        for k, v in own.items()
        if k in ("bos_token_id", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens")
    }
    model.generation_config = GenerationConfig(
        **kept,
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
        _write_json(path, data)


def copy_code(config: ModelConfig, folder: Path) -> None:
    """Copies a local base's own modelling code, which its configuration refers to."""
    base = project_path(config.base)
    if config.trust_remote_code and base.is_dir():
        for path in sorted(base.glob("*.py")):
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

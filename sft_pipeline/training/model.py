"""Loading and saving: the base model, what of it is trained, and trained checkpoints.

safetensors only, no remote code unless the recipe says so, hub models only at a pinned commit. What was asked
for is what runs: attention and precision are checked after loading, and reported.
"""

import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft_pipeline.bounded import matching
from sft_pipeline.errors import InputError
from sft_pipeline.external_files import ADAPTER_CONFIG
from sft_pipeline.hub import clear_loading_errors
from sft_pipeline.training.adapters import add_adapter, refuse_own_linear_layers
from sft_pipeline.training.base import base_folder, load_model_config
from sft_pipeline.training.base_weights import refuse_other_weights
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.loss import causal_model
from sft_pipeline.training.process import disable_progress_bars

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, as it is: recorded in training.json."""

    architecture: str
    parameterization: str
    attention: str
    precision: str
    weights_dtype: str
    device: str
    total_parameters: int
    trainable_parameters: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def training_device() -> torch.device:
    """This process's device: the GPU of its local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def resolve_precision(asked: str, device: torch.device) -> str:
    """bf16 where the GPU has it (fp16 where it would be emulated: T4, V100), fp32 on a CPU.

    Raises:
        InputError: The device cannot do what was asked for.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if has_bf16 else "fp16"
    if asked == "bf16" and not has_bf16:
        raise InputError("training.precision bf16: this GPU has no bfloat16. Set fp16 or fp32")
    if asked == "fp16" and device.type == "cpu":
        raise InputError("training.precision fp16 needs a GPU. Set bf16 or fp32")
    return asked


def resolve_attention(
    asked: str, device: torch.device, architecture: Any = None, *, flash: bool = True
) -> str:
    """For `auto` flash attention where it is installed on a GPU, else sdpa, else eager.

    Args:
        architecture: The model class, whose `_supports_...` say what it has; None for one that has all.
        flash: Whether `auto` may take flash attention, which computes in half precision only.
    """
    if asked != "auto":
        return asked
    # transformers has no public name for what an architecture supports.
    if flash and device.type == "cuda" and getattr(architecture, "_supports_flash_attn", True):
        packages = {"flash_attn_interface": "flash_attention_3", "flash_attn": "flash_attention_2"}
        for package, name in packages.items():
            if importlib.util.find_spec(package):
                return name
    return "sdpa" if getattr(architecture, "_supports_sdpa", True) else "eager"


def load_base(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    four_bit: bool = False,
    flash: bool = True,
) -> Any:
    """The base model in evaluation mode, with the attention that was asked for.

    Args:
        dtype: Of the weights (of the computation where four_bit).
        four_bit: NF4 with double quantization (Dettmers et al. 2023); needs bitsandbytes.
        flash: As in `resolve_attention`.

    Raises:
        InputError: Unknown base, no safetensors, other tensors than the architecture has, or an attention
            implementation that this machine or model lacks.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    disable_progress_bars()
    device = device or training_device()
    folder = base_folder(config)
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(load_model_config(config)), None)
    attention = resolve_attention(config.attention, device, architecture, flash=flash)
    extra: dict[str, Any] = {}
    if four_bit:
        refuse_own_linear_layers(config.base, empty_model(config))
        extra = {"quantization_config": _nf4(dtype), "device_map": {"": device}}
    with clear_loading_errors(f"model.base {config.base} with attention {attention}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **extra,
        )
    model, info = loaded
    refuse_other_weights(config.base, info)
    got = model.config._attn_implementation
    if got != attention:
        raise InputError(
            f"model.attention {attention}: {type(model).__name__} loaded with {got} instead. "
            f"Set model.attention to {got}, or install what {attention} needs"
        )
    if four_bit:
        _keep_four_bit_weights(model)
    else:
        model.to(device)  # type: ignore[arg-type]
    return model.eval()


def empty_model(config: ModelConfig) -> Any:
    """The base's architecture without weights, on the meta device."""
    from transformers import AutoModelForCausalLM

    described = load_model_config(config)
    with torch.device("meta"), clear_loading_errors(f"model.base {config.base}"):
        return AutoModelForCausalLM.from_config(described, trust_remote_code=config.trust_remote_code)


def load_for_training(
    config: ModelConfig,
    training: TrainingConfig,
    checkpoint: Path | None = None,
    *,
    device: torch.device | None = None,
) -> tuple[Any, LoadReport]:
    """The model that will be trained, adapters and freezing applied, in training mode.

    Frozen weights are held in the precision of the computation, trained ones in fp32 (adapters, full
    fine-tuning), so that small updates are not rounded away.

    Args:
        checkpoint: Continue from the weights of this folder instead of the base's (resume).

    Raises:
        InputError: Unknown base, or a precision or attention that this machine or model lacks.
    """
    device = device or training_device()
    if config.attention == "flex_attention" and device.type == "cpu":
        raise InputError(
            "model.attention flex_attention has no gradients on a CPU. "
            "Set sdpa, or auto, which takes the best there is"
        )
    precision = resolve_precision(training.precision, device)
    adapters = config.parameterization != "full"
    dtype = DTYPES[precision] if adapters else torch.float32
    torch.manual_seed(training.seed)  # the adapters' initial weights
    source = config if adapters or checkpoint is None else _as_base(config, checkpoint)
    model = load_base(source, dtype=dtype, device=device, four_bit=config.parameterization == "qlora")
    model.config.use_cache = False
    if adapters:
        model = add_adapter(model, config, checkpoint, gradient_checkpointing=training.gradient_checkpointing)
    else:
        model.requires_grad_(True)
        freeze(model, config.freeze)
    model.train()
    causal = causal_model(model)
    total, trained = count_parameters(model)
    return model, LoadReport(
        architecture=type(causal).__name__,
        parameterization=config.parameterization,
        attention=causal.config._attn_implementation,
        precision=precision,
        weights_dtype="nf4"
        if config.parameterization == "qlora"
        else str(causal.dtype).removeprefix("torch."),
        device=causal.device.type,
        total_parameters=total,
        trainable_parameters=trained,
    )


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stops training every parameter whose name one of the regular expressions finds.

    Raises:
        InputError: A pattern matches nothing or does not finish, or nothing is left to train.
    """
    for pattern in patterns:
        parameters = dict(model.named_parameters())
        matched = matching("model.freeze", pattern, list(parameters))
        if not matched:
            some = ", ".join(list(parameters)[:5])
            raise InputError(f'model.freeze "{pattern}" matches no parameter; names look like: {some}')
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("model.freeze leaves nothing to train")


def _as_base(config: ModelConfig, checkpoint: Path) -> ModelConfig:
    """A checkpoint of whole weights takes the base's place."""
    return config.model_copy(update={"base": str(checkpoint), "revision": None})


def inference_dtype(precision: str) -> torch.dtype | None:
    """For `load_for_inference`, by the precision of the training: fp32 is kept, for half precision null."""
    return torch.float32 if precision == "fp32" else None


def load_for_inference(
    config: ModelConfig,
    checkpoint: Path | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    as_trained: bool = False,
) -> Any:
    """The model of a checkpoint, to generate or score with: what is judged, exported and compared.

    In evaluation mode, gradients off. An adapter is put on the base as it is, also one that was trained on
    the base's 4-bit form.

    Args:
        config: The recipe's model section.
        checkpoint: A `checkpoint-<step>` folder with an adapter or whole weights; None for the base itself.
        dtype: null: bf16 on a GPU that has it, fp32 on a CPU.
        as_trained: For QLoRA the 4-bit model that was trained, to say how far from it the exported one is.
    """
    device = device or training_device()
    dtype = dtype or DTYPES[resolve_precision("auto", device)]
    flash = dtype != torch.float32
    if checkpoint is None or (checkpoint / ADAPTER_CONFIG).is_file():
        four_bit = as_trained and config.parameterization == "qlora" and checkpoint is not None
        model = load_base(config, dtype=dtype, device=device, four_bit=four_bit, flash=flash)
        if checkpoint is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=False)
    else:
        model = load_base(_as_base(config, checkpoint), dtype=dtype, device=device, flash=flash)
    model.requires_grad_(False)
    return model.eval()


def save_weights(model: Any, folder: Path, config: ModelConfig) -> None:
    """Writes the adapter, or the whole weights, as safetensors; the bytes depend on the weights alone.

    PEFT writes the base's path and an unordered list of modules into adapter_config.json: the path is
    replaced by the recipe's own name for the base, and lists are sorted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapters = hasattr(model, "peft_config")
    model.save_pretrained(str(folder), **({"save_embedding_layers": False} if adapters else {}))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / (ADAPTER_CONFIG if adapters else "config.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    data.pop("_name_or_path", None)
    if adapters:
        data |= {"base_model_name_or_path": config.base, "revision": config.revision}
        for key, value in data.items():
            if isinstance(value, list) and all(isinstance(x, str) for x in value):
                data[key] = sorted(value)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(all, trained). A 4-bit weight stores two values a byte, so it counts twice."""
    total = trained = 0
    for parameter in model.parameters():
        n = parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        total += n
        trained += n if parameter.requires_grad else 0
    return total, trained


def _nf4(compute: torch.dtype) -> Any:
    """NF4 with double quantization."""
    from transformers import BitsAndBytesConfig

    if not importlib.util.find_spec("bitsandbytes"):
        raise InputError(
            "model.parameterization qlora needs bitsandbytes, which is not installed here. "
            "Install it or use lora"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _keep_four_bit_weights(model: nn.Module) -> None:
    """Switches off bitsandbytes' repacking for CPU inference.

    On a CPU with AVX512-BF16 the first forward in evaluation mode rewrites the weights and rounds their
    scales to bf16, and fails on widths that 32 does not divide: an evaluation would change the model in the
    middle of training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

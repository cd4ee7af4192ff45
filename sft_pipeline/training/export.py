"""From a checkpoint to a model that others load: merged, written, loaded again and compared.

What stands for a checkpoint wherever it is judged, exported or compared is `load_for_inference`: the base as
it is, and the adapter on it. Also a QLoRA adapter, which was trained on the base's 4-bit form, is judged and
merged on the base itself: `merge_and_unload` on a 4-bit model gives wrong logits, and who loads the exported
adapter puts it on the base (Dettmers et al. 2023 train through the quantized weights but ship the adapter).
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.external_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sft_pipeline.project import project_path
from sft_pipeline.text.exported_tokenizer import write_sorted_json
from sft_pipeline.training.base import base_folder, load_model_config
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.logits import LogitDifference, difference, free_memory, greedy, logits
from sft_pipeline.training.memory import weight_shapes
from sft_pipeline.training.model import load_base, load_for_inference, training_device

ROOM = 1.2  # of the weights' bytes, for what is computed with them
_GENERATION_KEYS_KEPT = ("bos_token_id", "decoder_start_token_id", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class ExportSettings:
    """How a checkpoint is exported.

    Attributes:
        merge: Whether the weights are written whole; otherwise the adapter is what is exported.
        dtype: Of merged weights: a torch dtype's name, or `auto`.
        stop_ids: What ends a reply.
        decoding: temperature (0: greedy) and top_p.
    """

    model: ModelConfig
    merge: bool
    dtype: str
    stop_ids: list[int]
    pad_id: int
    decoding: dict[str, Any]


def exact_device(config: ModelConfig) -> torch.device:
    """Where the model is compared in fp32: the GPU where it fits beside what is there already, else the CPU.

    A few short sequences are all that is computed; a GPU that trained the model in 16 or 4 bits may well be
    too small for it.
    """
    device = training_device()
    if device.type == "cuda":
        shapes = weight_shapes(base_folder(config)).values()
        free, _ = torch.cuda.mem_get_info(device)
        if ROOM * 4 * sum(math.prod(shape) for shape in shapes) > free:
            return torch.device("cpu")
    return device


def load_exact(config: ModelConfig, checkpoint: Path, device: torch.device | None = None) -> Any:
    """The checkpoint's model in fp32: base and adapter apart, or the whole weights."""
    return load_for_inference(
        with_any_attention(config), checkpoint, dtype=torch.float32, device=device or exact_device(config)
    )


def with_any_attention(config: ModelConfig) -> ModelConfig:
    """The same model with the attention that this machine has."""
    return config.model_copy(update={"attention": "auto"})


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
    path = Path(os.path.expanduser(base))
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


def write_merged(model: Any, folder: Path, settings: ExportSettings) -> None:
    """Saves whole weights as safetensors, with a generation config that stops, and decodes, as the evaluation
    did.

    A local base's own modelling code, which its configuration refers to, is copied beside them.
    """
    from transformers import GenerationConfig

    model.config.use_cache = True  # training switches it off, and would have it off for every server
    text_config = model.config.get_text_config()
    stop_ids, decoding = settings.stop_ids, settings.decoding
    text_config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else stop_ids
    text_config.pad_token_id = settings.pad_id
    sampling = decoding["temperature"] > 0
    own = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    model.generation_config = GenerationConfig(
        **{k: own[k] for k in _GENERATION_KEYS_KEPT if k in own},
        eos_token_id=stop_ids,
        pad_token_id=settings.pad_id,
        do_sample=sampling,
        **({"temperature": decoding["temperature"], "top_p": decoding["top_p"]} if sampling else {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    for path in (folder / "config.json", folder / "generation_config.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        data.pop("_name_or_path", None)
        write_sorted_json(path, data)
    base = project_path(settings.model.base)
    if settings.model.trust_remote_code and base.is_dir():
        for path in sorted(base.glob("*.py")):
            shutil.copyfile(path, folder / path.name)


@dataclass(frozen=True)
class ExportProof:
    """What was measured while the weights were written and loaded again.

    Attributes:
        exact: Before casting: merged against base and adapter, both in fp32. None where nothing was merged.
        loaded: The reference (the checkpoint in fp32) against the export loaded again, in its own dtype.
        quantized: The reference against the 4-bit model that was trained, for QLoRA.
        before, after: Ids of greedy answers before saving and after loading again.
        dtype: Of the exported weights.
    """

    exact: LogitDifference | None
    loaded: LogitDifference
    quantized: LogitDifference | None
    before: list[list[int]]
    after: list[list[int]]
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        """Whether rounding explains every difference of a logit."""
        return self.loaded.within(self.dtype) and (self.exact is None or self.exact.within(torch.float32))

    def __str__(self) -> str:
        loaded = self.loaded
        words = (
            f"{'exported' if self.exact is None else 'merged'} weights loaded again in "
            f"{str(self.dtype).removeprefix('torch.')}: logits differ by at most {loaded.largest:.2g} "
            f"of {loaded.scale:.3g}, the likeliest token agrees at {loaded.agreement:.1%} of positions"
        )
        if self.exact is not None:
            words += f"; the merge itself, in fp32: {self.exact.largest:.2g}"
        if self.quantized is not None:
            words += (
                f"; the 4-bit model that was trained differs from what is exported by "
                f"{self.quantized.largest:.2g}, agreement {self.quantized.agreement:.1%}"
            )
        if not self.passed:
            words += (
                ". That is more than rounding explains: try export.dtype float32, or report the architecture"
            )
        return words


def write_and_compare(
    settings: ExportSettings,
    checkpoint: Path,
    folder: Path,
    sequences: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    step: Callable[[str], None] = lambda name: None,
) -> ExportProof:
    """Writes merged weights where they are wanted, and loads the export again, one model in memory at a time.

    Without merged weights the exported adapter on the base is compared with the checkpoint on the base, in
    fp32.

    Args:
        folder: Where merged weights are written, or where the exported adapter lies.
        sequences: Ids whose logits are compared.
        prompts: Ids that are answered greedily, with at most `new_tokens`.
        step: Told what has been done.
    """
    stops: dict[str, Any] = {"eos_token_id": settings.stop_ids, "pad_token_id": settings.pad_id}
    dtype = target_dtype(settings.dtype, settings.model) if settings.merge else torch.float32
    device = exact_device(settings.model)
    model = load_exact(settings.model, checkpoint, device)
    has_adapter = hasattr(model, "peft_config")
    reference, exact = logits(model, sequences), None
    step("checkpoint loaded")
    if settings.merge:
        model = merge_adapter(model)
        exact = difference(reference, logits(model, sequences)) if has_adapter else None
        model = model.to(dtype)
        write_merged(model, folder, settings)
        step("weights written")
    before = greedy(model, prompts, new_tokens, **stops)
    del model
    free_memory()
    if settings.merge:
        model = reload_model(folder, trust_remote_code=settings.model.trust_remote_code, device=device)
        stops = {}  # the exported generation config has to stop the answers by itself
    else:
        from peft import PeftModel

        base = load_base(with_any_attention(settings.model), dtype=torch.float32, device=device, flash=False)
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        del base
    loaded = difference(reference, logits(model, sequences))
    after = greedy(model, prompts, new_tokens, **stops)
    del model
    free_memory()
    step("export loaded again")
    quantized = None
    if settings.model.parameterization == "qlora":
        model = load_for_inference(settings.model, checkpoint, as_trained=True)
        quantized = difference(reference, logits(model, sequences))
        del model
        free_memory()
    return ExportProof(exact, loaded, quantized, before, after, dtype)


def reload_model(folder: Path, *, trust_remote_code: bool, device: torch.device | None = None) -> Any:
    """The exported weights as a stranger would load them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.to(device or training_device()).eval()

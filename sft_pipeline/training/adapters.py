"""Low-rank adapters on a base (Hu et al. 2021), by PEFT, and what of them cannot be trained or exported."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sft_pipeline.bounded import matching
from sft_pipeline.errors import InputError
from sft_pipeline.training.config import ModelConfig


def add_adapter(
    model: Any, config: ModelConfig, checkpoint: Path | None = None, *, gradient_checkpointing: bool = False
) -> Any:
    """Wraps the base in low-rank adapters: freshly initialised, or those of a checkpoint.

    Raises:
        InputError: `target_modules` names no module of this architecture, or one that cannot be adapted.
    """
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if config.parameterization == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    settings = config.lora
    every = settings.target_modules == "all-linear"
    if isinstance(settings.target_modules, str) and not every:
        # PEFT matches the same names with `re`, which could not be stopped.
        names = [name for name, _ in model.named_modules()]
        matching("model.lora.target_modules", settings.target_modules, names, whole=True)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=settings.target_modules,
        exclude_modules=(layers_with_own_forward(model) or None) if every else None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    wrapped: Any
    try:
        if checkpoint is None:
            wrapped = get_peft_model(model, lora)
        else:
            wrapped = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    except ValueError as error:
        if "ParamWrapper" in str(error):  # experts of one tensor each: "does not work with lora_dropout != 0"
            raise InputError(
                f"model.lora.target_modules {settings.target_modules} includes the experts of this model, "
                "which are single tensors that PEFT adapts without dropout or DoRA only. Set "
                "model.lora.dropout to 0 and use_dora to false, or name the attention's layers alone, such "
                f"as [q_proj, k_proj, v_proj, o_proj] (PEFT: {error})"
            ) from error
        raise InputError(f"model.lora.target_modules {settings.target_modules}: {error}") from error
    refuse_unfit_adapters(wrapped, config)
    if gradient_checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


def refuse_unfit_adapters(wrapped: Any, config: ModelConfig) -> None:
    """Raises where another model would be trained, judged or exported than is asked for.

    Raises:
        InputError: An adapter is on the output layer, on input embeddings that are the output layer too, or
            on a layer whose output is not the product that an adapter adds to.
    """
    targets = f"model.lora.target_modules {config.lora.target_modules}"
    head = wrapped.get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise InputError(
            f"{targets} includes the output layer, whose adapter the loss could not see. Leave it out"
        )
    embedding = wrapped.get_input_embeddings()
    if hasattr(embedding, "lora_embedding_A") and getattr(head, "weight", None) is embedding.weight:
        raise InputError(
            f"{targets} includes the input embeddings, which this model shares with its output layer: merged "
            "into them, the adapter would change the output too, and another model would be judged and "
            "exported than was trained. Leave them out"
        )
    for name in layers_with_own_forward(wrapped):
        if name.endswith(".base_layer"):
            layer = name.removesuffix(".base_layer").rpartition(".")[2]
            raise InputError(
                f"{targets} includes {layer}, a router that returns more than its product. Leave it out"
            )


def layers_with_own_forward(model: nn.Module) -> list[str]:
    """Names of linear layers that return something else than their product, such as Llama 4's routers."""
    return [name for name, module in model.named_modules() if _returns_more(module)]


def _returns_more(module: nn.Module) -> bool:
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    if not own or not type(module).__module__.startswith(("transformers.models.", "transformers_modules.")):
        return False
    weight: Any = module.weight
    try:
        with torch.no_grad():
            return not isinstance(module(weight.new_zeros(1, weight.shape[1])), torch.Tensor)
    except TypeError:  # it takes more than its input
        return True


def refuse_own_linear_layers(base: str, model: nn.Module) -> None:
    """Raises where loading in 4 bits would replace layers that compute something of their own.

    Args:
        model: The base, with or without weights.
    """
    if found := layers_with_own_forward(model):
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise InputError(
            f"model.parameterization qlora: loading {base} in 4 bits would replace {found[0]}{others}, which "
            "computes more than a linear layer does. Use lora or full"
        )

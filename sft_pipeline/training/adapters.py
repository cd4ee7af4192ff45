"""What of a model is trained: low-rank adapters, or everything that is not frozen."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from sft_pipeline.errors import InputError
from sft_pipeline.training.config import ModelConfig


def add_adapter(
    model: Any, config: ModelConfig, checkpoint: Path | None = None, *, gradient_checkpointing: bool = False
) -> Any:
    """Wraps the base in low-rank adapters: freshly initialised, or those of a checkpoint.

    Raises:
        InputError: `target_modules` names no module of this architecture.
    """
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if config.parameterization == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    settings = config.lora
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        bias="none",
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )
    try:
        wrapped = (
            get_peft_model(model, lora)
            if checkpoint is None
            else PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
        )
    except ValueError as error:
        raise InputError(f"model.lora.target_modules {settings.target_modules}: {error}") from error
    head = wrapped.get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise InputError(
            f"model.lora.target_modules {settings.target_modules} includes the output layer, whose adapter the loss could not see. Leave it out"
        )
    if gradient_checkpointing:
        wrapped.enable_input_require_grads()
    return wrapped


def freeze(model: nn.Module, patterns: list[str]) -> list[str]:
    """Stops training every parameter whose name one of the regular expressions finds. Returns their names.

    Raises:
        InputError: A pattern matches nothing, or nothing is left to train.
    """
    frozen: list[str] = []
    for pattern in patterns:
        try:
            matched = [(n, p) for n, p in model.named_parameters() if re.search(pattern, n)]
        except re.error as error:
            raise InputError(f'model.freeze "{pattern}": not a regular expression ({error})') from error
        if not matched:
            some = ", ".join(n for n, _ in list(model.named_parameters())[:5])
            raise InputError(f'model.freeze "{pattern}" matches no parameter; names look like: {some}')
        for name, parameter in matched:
            parameter.requires_grad_(False)
            frozen.append(name)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError("model.freeze leaves nothing to train")
    return frozen

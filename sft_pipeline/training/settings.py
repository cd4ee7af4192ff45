"""How the trainer is set up: its arguments, the asserts at its start, and random state kept apart."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl import SFTConfig

from sft_pipeline.training.config import TrainingConfig
from sft_pipeline.training.schedule import Schedule


def arguments(
    training: TrainingConfig,
    schedule: Schedule,
    precision: str,
    folder: Path,
    updates: int,
    *,
    cpu: bool,
    distributed: bool,
) -> SFTConfig:
    """Every setting is explicit whose default would do something else: bf16 on, checkpointing on, truncation at 1,024."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=updates,
        per_device_train_batch_size=training.per_device_batch,
        gradient_accumulation_steps=1,
        learning_rate=schedule.peak,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.clip,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing=None,  # type: ignore[arg-type]
        activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        torch_compile=training.compile,
        neftune_noise_alpha=training.neftune_alpha,
        max_length=None,
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and distributed else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        ignore_data_skip=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
        seed=training.seed,
        data_seed=training.seed,
    )


def assert_launch(accelerator: Any, world: int) -> None:
    """Several launch mistakes train copies that never talk to each other; none of them may pass unseen."""
    kind = (
        accelerator.distributed_type.value
        if hasattr(accelerator.distributed_type, "value")
        else str(accelerator.distributed_type)
    )
    if accelerator.num_processes != world:
        raise AssertionError(
            f"launched as {world} processes, but the trainer sees {accelerator.num_processes} ({kind}): they would train unsynchronised copies"
        )
    if world > 1 and kind not in ("MULTI_CPU", "MULTI_GPU"):
        raise AssertionError(
            f"{world} processes under distributed type {kind}: gradients would not be summed"
        )


def assert_wrapped(model: Any, world: int) -> None:
    """With more than one process the model must be in a wrapper that sums gradients."""
    if world > 1 and not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise AssertionError(
            f"{world} processes, but the model is a bare {type(model).__name__}: gradients would not be summed"
        )


@contextlib.contextmanager
def keep_rng() -> Iterator[None]:
    """Puts every random state back as it was, so that an evaluation does not change the training."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy_state)

"""The model and training sections of a recipe, read by every stage that touches the model."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sft_pipeline.bounded import compiled
from sft_pipeline.config.base import Config


class LoraConfig(Config):
    """Low-rank adapters (Hu et al. 2021), with the rsLoRA and DoRA switches of PEFT."""

    r: Annotated[int, Field(ge=1, description="rank of the adapters")] = 16
    alpha: Annotated[int, Field(ge=1, description="the adapters are scaled by alpha / r")] = 32
    dropout: Annotated[float, Field(ge=0, lt=1, description="on the adapters' input, in training")] = 0.05
    target_modules: Annotated[
        str | list[str],
        Field(
            description="names (or parts of names) of the layers that get adapters; all-linear: every "
            "linear layer but the head"
        ),
    ] = "all-linear"
    use_rslora: Annotated[bool, Field(description="scale by alpha / sqrt(r), for high ranks")] = False
    use_dora: Annotated[bool, Field(description="learn magnitudes beside directions; slower")] = False

    @field_validator("target_modules")
    @classmethod
    def _is_expression(cls, targets: str | list[str]) -> str | list[str]:
        if isinstance(targets, str):
            compiled(targets)
        return targets


class ModelConfig(Config):
    """The base model and what of it is trained."""

    base: Annotated[str, Field(min_length=1, description="local folder or hub id")]
    revision: Annotated[
        str | None, Field(description="commit of the hub repository; required for a hub id")
    ] = None
    tokenizer: Annotated[str | None, Field(description="folder or hub id; null: the base model's own")] = None
    parameterization: Annotated[
        Literal["full", "lora", "qlora"],
        Field(
            description="lora: adapters; qlora: adapters, trained on the base in 4 bits; full: all weights"
        ),
    ] = "lora"
    lora: LoraConfig = LoraConfig()
    attention: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"],
        Field(
            description="auto: flash attention where installed on a GPU, else sdpa; "
            "never substituted silently"
        ),
    ] = "auto"
    freeze: Annotated[
        list[str], Field(description="full only: regular expressions of parameter names that are not trained")
    ] = []
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the base")] = False

    @field_validator("freeze")
    @classmethod
    def _are_expressions(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                compiled(pattern)
            except ValueError as error:
                raise ValueError(f'"{pattern}" is {error}') from error
        return patterns


class EarlyStopping(Config):
    """Stop when the validation loss has not improved."""

    patience: Annotated[int, Field(ge=1, description="evaluations")] = 3
    min_delta: Annotated[
        float, Field(ge=0, description="by how much the validation loss must fall to count")
    ] = 0.0


class TrainingConfig(Config):
    """One training. With packing, batch sizes count blocks; without it, examples."""

    epochs: Annotated[int, Field(ge=1, description="times every row is seen")] = 2
    max_steps: Annotated[int | None, Field(ge=1, description="stop after this many updates")] = None
    learning_rate: Annotated[
        float | None, Field(gt=0, description="null: 1e-4 for adapters, 2e-5 for full")
    ] = None
    min_learning_rate: Annotated[float, Field(ge=0, description="where cosine and linear end")] = 0.0
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        Field(description="of the learning rate after the warm-up; wsd: constant, then a linear decay"),
    ] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1, description="fraction of the updates")] = 0.05
    decay: Annotated[
        float, Field(gt=0, le=1, description="wsd only: fraction of the updates in which the rate decays")
    ] = 0.2
    weight_decay: Annotated[float, Field(ge=0, description="of AdamW, on matrices")] = 0.01
    adam_betas: Annotated[tuple[float, float], Field(description="decay of AdamW's two moments")] = (
        0.9,
        0.999,
    )
    adam_epsilon: Annotated[float, Field(gt=0, description="of AdamW")] = 1e-8
    clip: Annotated[float, Field(gt=0, description="gradient norm")] = 1.0
    per_device_batch: Annotated[
        int, Field(ge=1, description="blocks (without packing, examples) in one forward pass of a process")
    ] = 4
    gradient_accumulation: Annotated[
        int, Field(ge=1, description="forward passes of a process for one update")
    ] = 1
    processes: Annotated[int, Field(ge=1, description="data-parallel processes on this machine")] = 1
    blocks_per_update: Annotated[
        int | None, Field(ge=1, description="null: per_device_batch x gradient_accumulation x processes")
    ] = None
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        Field(description="auto: bf16 where the GPU has it, fp16 on other GPUs, fp32 on a CPU"),
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, Field(description="compute activations again in the backward pass: less memory, more time")
    ] = False
    compile: Annotated[bool, Field(description="torch.compile the model")] = False
    neftune_alpha: Annotated[
        float | None,
        Field(gt=0, description="noise on embeddings, by the length of each example; null: none"),
    ] = None
    eval_steps: Annotated[
        int | None, Field(ge=1, description="updates between evaluations; null: ten evaluations a run")
    ] = None
    save_steps: Annotated[
        int | None, Field(ge=1, description="updates between checkpoints; null: at every evaluation")
    ] = None
    keep_checkpoints: Annotated[
        int | None,
        Field(ge=1, description="keep the last N and the best; null: all, for evaluation to choose from"),
    ] = None
    early_stopping: Annotated[
        EarlyStopping | None, Field(description="stop when the validation loss has not improved; null: never")
    ] = None
    report_to: Annotated[
        list[Literal["tensorboard", "wandb"]], Field(description="the trainer's own reporting, beside MLflow")
    ] = []
    seed: Annotated[
        int, Field(ge=0, lt=2**32, description="of the order of blocks, dropout and new weights")
    ] = 42

    @model_validator(mode="after")
    def _units_divide(self) -> "TrainingConfig":
        if self.blocks_per_update and self.blocks_per_update % self.processes:
            raise ValueError(
                f"blocks_per_update {self.blocks_per_update} cannot be divided over "
                f"{self.processes} processes: take a multiple"
            )
        return self

    @property
    def planned_blocks(self) -> int:
        """Blocks per update: as given, or per_device_batch x gradient_accumulation x processes."""
        return self.blocks_per_update or self.per_device_batch * self.gradient_accumulation * self.processes

    def identity(self) -> dict[str, Any]:
        """Without how an update is divided over processes and micro-batches: only its number of blocks."""
        division = ("processes", "per_device_batch", "gradient_accumulation")
        return {k: v for k, v in super().identity().items() if k not in division} | {
            "blocks_per_update": self.planned_blocks
        }

"""What exported_model reads of a recipe."""

from typing import Annotated

from pydantic import Field

from sft_pipeline.config.base import Config
from sft_pipeline.training.config import ModelConfig


class ExportConfig(Config):
    """What is exported, and how."""

    merge: Annotated[bool, Field(description="also write merged weights that need no PEFT to serve")] = True
    dtype: Annotated[
        str,
        Field(
            pattern="^(auto|float32|bfloat16|float16)$",
            description="of the merged weights; auto: the base model's",
        ),
    ] = "auto"
    license: Annotated[str | None, Field(description="of the model, for its card")] = None


class ExportedModelConfig(Config):
    """Everything exported_model depends on."""

    export: ExportConfig
    model: ModelConfig
    recipe: str
    dataset: str

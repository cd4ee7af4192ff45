"""What trained_checkpoints reads of a recipe."""

from typing import Any

from sft_pipeline.config.base import Config
from sft_pipeline.training.config import ModelConfig, TrainingConfig


class TrainedCheckpointsConfig(Config):
    """Everything trained_checkpoints depends on."""

    model: ModelConfig
    training: TrainingConfig

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"training": self.training.identity()}

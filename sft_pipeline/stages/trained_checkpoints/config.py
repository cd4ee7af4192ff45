"""What trained_checkpoints reads of a recipe."""

from sft_pipeline.config.base import Config
from sft_pipeline.learning.config import ModelConfig, TrainingConfig


class TrainedCheckpointsConfig(Config):
    """Everything trained_checkpoints depends on."""

    model: ModelConfig
    training: TrainingConfig

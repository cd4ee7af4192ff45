"""The recipe file."""

from typing import Annotated

from pydantic import Field

from sft_pipeline.config.base import Config
from sft_pipeline.config.dataset import Name
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.exported_model.config import ExportConfig
from sft_pipeline.stages.packed_shards.config import PackingConfig
from sft_pipeline.stages.sanity_check.config import SanityConfig
from sft_pipeline.stages.tokenized_rows.config import TemplateConfig, TokensConfig
from sft_pipeline.training.config import ModelConfig, TrainingConfig


class RetrainConfig(Config):
    """When the branch runs by itself."""

    on_new_snapshot: Annotated[bool, Field(description="the sensor runs the branch on each new snapshot")] = (
        False
    )
    cron: Annotated[str | None, Field(description="five cron fields")] = None


class RecipeConfig(Config):
    """Everything that makes a model besides the data."""

    name: Name
    description: Annotated[
        str,
        Field(description="shown in Dagster, at the recipe's job, and in MLflow, at the registered model"),
    ] = ""
    owner: Annotated[str | None, Field(description="e-mail or team:name, shown in the UI")] = None
    extends: Annotated[
        str | None, Field(description="another recipe, or a preset, whose values are inherited")
    ] = None
    dataset: Annotated[str, Field(description="name of the dataset")]
    model: ModelConfig
    template: TemplateConfig = TemplateConfig()
    tokens: TokensConfig = TokensConfig()
    packing: PackingConfig = PackingConfig()
    sanity: SanityConfig = SanityConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    retrain: RetrainConfig = RetrainConfig()

    @property
    def tokenizer(self) -> str:
        """Folder or hub id of the tokenizer."""
        return self.model.tokenizer or self.model.base

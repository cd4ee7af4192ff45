"""What sanity_check reads of a recipe."""

from typing import Annotated, Any

from pydantic import Field

from sft_pipeline.config.base import Config
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.exported_model.config import ExportConfig
from sft_pipeline.training.config import ModelConfig, TrainingConfig


class SanityConfig(Config):
    """The protocol that runs before training."""

    skip: Annotated[bool, Field(description="accept without running; recorded in the manifest")] = False
    overfit_rows: Annotated[int, Field(ge=1, description="rows of the overfit run")] = 20
    overfit_steps: Annotated[int, Field(ge=1, description="updates of the overfit run")] = 60
    overfit_loss: Annotated[
        float, Field(gt=0, lt=1, description="the overfit loss must fall to this fraction of its start")
    ] = 0.5
    short_run_steps: Annotated[int, Field(ge=2, le=200, description="updates of the short run")] = 20
    samples: Annotated[int, Field(ge=0, description="replies that are generated and shown")] = 3


class SanityCheckConfig(Config):
    """Everything sanity_check depends on."""

    sanity: SanityConfig
    model: ModelConfig
    training: TrainingConfig
    export: ExportConfig = ExportConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tokenizer: str
    tokenizer_revision: str | None
    template: dict
    tokens: dict

    def identity(self) -> dict[str, Any]:
        """Of training with the micro-batch, whose memory is tried out, without the processes: the check has
        one. Of evaluation and export what is tried here.
        """
        whole = super().identity()
        return whole | {
            "evaluation": {name: whole["evaluation"][name] for name in ("graders", "max_rows")},
            "export": {"merge": self.export.merge, "dtype": self.export.dtype},
            "training": self.training.identity() | {"per_device_batch": self.training.per_device_batch},
        }

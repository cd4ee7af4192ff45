"""The trainer's own reporting (`training.report_to`), beside MLflow. Light: nothing is imported."""

import importlib.util

from sft_pipeline.errors import InputError
from sft_pipeline.training.config import TrainingConfig


def require_reporters(training: TrainingConfig) -> None:
    """Looks for the packages that the training will report with, before anything is built for it.

    Raises:
        InputError: One is not installed here.
    """
    for name in training.report_to:
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"training.report_to {name}: the package {name} is not installed here. "
                f"pip install 'sft-pipeline[{name}]', or leave it out: MLflow records every run anyway"
            )

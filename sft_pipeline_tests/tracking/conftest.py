"""An MLflow database of the test's own."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; making one takes seconds, copying it does not."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def client(home: Path, migrated_database: Path):
    from sft_pipeline.tracking.server import connect

    shutil.copy(migrated_database, home / "mlflow.db")
    return connect()

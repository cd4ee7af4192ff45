"""Addresses of the two UIs, so that each can point at the other."""

import os

DAGSTER_PORT = 3000
MLFLOW_PORT = 5000


def dagster_run_url(run_id: str) -> str:
    base = os.environ.get("SFT_DAGSTER_URL") or f"http://127.0.0.1:{DAGSTER_PORT}"
    return f"{base.rstrip('/')}/runs/{run_id}"


def mlflow_run_url(experiment_id: str, run_id: str) -> str:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    base = os.environ.get("SFT_MLFLOW_URL") or (
        uri if uri.startswith("http") else f"http://127.0.0.1:{MLFLOW_PORT}"
    )
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"

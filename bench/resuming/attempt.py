"""One attempt at the training, as a Dagster step makes it: the stage against the store, MLflow, the supervised child.

It runs in a process of its own, forked from a server that has the imports, so that it can be killed like any other.
"""

import multiprocessing
import os
import sys
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import mlflow.tracking  # noqa: F401  # for the server to have it

from resuming.branch import branch, use_home
from sft_pipeline.launch.launcher import run_isolated
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.until import run_until
from sft_pipeline.store import Store
from sft_pipeline.tracking.mlflow import MlflowTracker

STAGE = "trained_checkpoints"


def prepare(home: str, kinds: list[str], rows: str, log: str) -> None:
    """Everything before the training."""
    _write_to(log)
    use_home(Path(home))
    for kind in kinds:
        run_until("sanity_check", STAGES, branch(kind, Path(rows)), Run(Store(Path(home)), _Lines()))


def train(home: str, kind: str, rows: str, log: str) -> None:
    """Brings trained_checkpoints up to date, going on where the last attempt was killed."""
    _write_to(log)
    use_home(Path(home))
    run = Run(Store(Path(home)), _Lines(), tracker=MlflowTracker(None), isolate=run_isolated)
    try:
        run_stage(STAGES[STAGE], STAGES, branch(kind, Path(rows)), run)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def start(target: Any, *arguments: Any) -> ForkServerProcess:
    """Starts one of the functions above."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resuming.attempt"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


class _Lines(Reporter):
    """Says what is told, for the log."""

    def log(self, message: str, level: str = "info") -> None:
        print(f"{level}: {message}", flush=True)


def _write_to(log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

"""The training that is killed: a small dataset on the embedded base model, with LoRA and with all weights.

An attempt at it is made as by a Dagster step: the stage against the store, MLflow, the supervised child. It
runs in a process of its own, forked from a server that has the imports, so that it can be killed like any
other.
"""

import json
import multiprocessing
import os
import sys
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import mlflow.tracking  # noqa: F401  # for the server to have it

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.launch.launcher import run_isolated
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.stages.run import Run, run_stage, run_until
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Store
from sft_pipeline.tracking.mlflow import MlflowTracker

STAGE = "trained_checkpoints"
ROOT = Path(__file__).resolve().parents[2]
ROWS = "kill_rows.jsonl"
KINDS: dict[str, dict[str, Any]] = {
    # Dropout draws random numbers in every update, so that a random state that was lost would show.
    "lora": {"parameterization": "lora", "lora": {"r": 8, "alpha": 16, "dropout": 0.1}},
    "full": {"parameterization": "full"},
}
RATES = {"lora": 4e-3, "full": 5e-4}
TRAINING = {
    "epochs": 8,
    "per_device_batch": 2,
    "eval_steps": 60,
    "save_steps": 4,
    "keep_checkpoints": 3,
    "warmup": 0.05,
}


def write_rows(folder: Path, count: int = 180) -> None:
    """Short rows of varying length, so that the token counts of an update tell which rows it held."""
    with (folder / ROWS).open("w") as stream:
        for i in range(count):
            words = " ".join(f"{(i * 37 + j * 11) % 97}" for j in range(2 + (i * 7) % 13))
            row = {"group": f"G{i}", "prompt": f"Count: {words}", "completion": f"{words} end {i}"}
            stream.write(json.dumps(row) + "\n")


def branch(kind: str, rows: Path) -> Branch:
    """The branch of one kind; `rows` is the folder that `write_rows` filled."""
    dataset = DatasetConfig.model_validate(
        {
            "name": "kills",
            "sources": [{"path": str(rows / ROWS), "static": True, "columns": {"group": "group"}}],
            "split": {"validation": 0.1, "test": 0, "near_duplicates": None},
        }
    )
    recipe = RecipeConfig.model_validate(
        {
            "name": f"kills_{kind}",
            "dataset": "kills",
            "model": {"base": "data/base_model", **KINDS[kind]},
            "tokens": {"max_length": 192},
            "sanity": {"skip": True},
            "training": {**TRAINING, "learning_rate": RATES[kind]},
        }
    )
    return Branch(dataset, snapshots(dataset.sources)[-1], recipe)


def use_home(home: Path) -> None:
    """Points this process, and what it starts, at a store."""
    os.environ |= {
        "SFT_PROJECT_ROOT": str(ROOT),
        "SFT_HOME": str(home),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
        "HF_HUB_OFFLINE": "1",
    }


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
    """Prints the messages, for the log."""

    def log(self, message: str, level: str = "info") -> None:
        print(f"{level}: {message}", flush=True)


def _write_to(log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

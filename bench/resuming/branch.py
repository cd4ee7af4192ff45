"""What is trained: a small dataset of its own on the embedded base model, with LoRA and with all weights."""

import json
import os
from pathlib import Path
from typing import Any

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.stages.stage import Branch

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
    from sft_pipeline.stages.raw_rows.locate import snapshots

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
    return Branch(dataset, snapshots(dataset)[-1], recipe)


def use_home(home: Path) -> None:
    """Points this process, and what it starts, at a store."""
    os.environ |= {
        "SFT_PROJECT_ROOT": str(ROOT),
        "SFT_HOME": str(home),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
        "HF_HUB_OFFLINE": "1",
    }

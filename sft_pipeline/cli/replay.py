"""`sft replay`: one update of a training again, row by row."""

import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact, Store

SHOWN = 20


def replay_update(training: str, *, update: int, console: Console) -> dict[str, Any]:
    """The JSON of the command.

    Raises:
        InputError: There is no such training or update, or what it read is not in the store any more.
    """
    artifact = find_training(training, Store())
    inputs = {}
    for name in ("packed_shards", "tokenized_rows"):
        entry = artifact.manifest.inputs.get(name)
        found = Store().get(entry.fingerprint) if entry else None
        if found is None:
            raise InputError(
                f"{artifact.path}: the {name} that it was trained on is not in the store any more"
            )
        found.verify()
        inputs[name] = found
    from sft_pipeline.stages.trained_checkpoints.build import read_data
    from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
    from sft_pipeline.stages.trained_checkpoints.replay import replay

    config = TrainedCheckpointsConfig.model_validate(artifact.manifest.config)
    data = read_data(inputs["packed_shards"], inputs["tokenized_rows"])
    with ConsoleReporter(console) as report, tempfile.TemporaryDirectory() as work:
        result = replay(config, data, artifact.path, update, Path(work), report)
    return {"training": str(artifact.path), "asset": artifact.manifest.asset, **result.to_json()}


def find_training(training: str, store: Store) -> Artifact:
    """A training by its folder, one of its checkpoints, its work folder, or the beginning of its fingerprint.

    Raises:
        InputError: None, or more than one.
    """
    path = Path(os.path.expanduser(training))
    folders = [path, path.parent] if path.is_dir() else []
    found = [Artifact(f) for f in folders if (f / "manifest.json").is_file()]
    if not found:
        prefix = path.name if folders else training
        found = [a for a in store.all() if a.path.name.startswith(prefix)] if prefix else []
    trainings = [a for a in found if a.file("history.parquet").is_file()]
    if not trainings:
        raise InputError(
            f"{training}: no finished training of that folder or fingerprint. "
            "`sft run --json` prints the folder as artifacts.trained_checkpoints"
        )
    if len(trainings) > 1:
        raise InputError(f"{training}: {len(trainings)} trainings begin like that: give more digits")
    return trainings[0]


def show_replay(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    table = Table(title=f"{result['asset']}, update {result['update']}")
    for column in ("loss", "supervised", "block"):
        table.add_column(column, justify="right")
    table.add_column("row_id", no_wrap=True)
    table.add_column("supervised text", overflow="ellipsis", no_wrap=True)
    for row in result["rows"][:SHOWN]:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        table.add_row(
            loss, f"{row['supervised']:,}", str(row["block"]), row["row_id"], Text(repr(row["text"]))
        )
    console.print(table)
    if len(result["rows"]) > SHOWN:
        console.print(f"and {len(result['rows']) - SHOWN} rows with a lower loss")
    for name, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
        now, then = result[name], result[f"recorded_{name}"]
        console.print(f"{what}: {_number(now)}, recorded {_number(then)}")
    if (result["grad_norm"] or 0) > result["clip"]:
        console.print(f"the gradient was clipped to {result['clip']:g}")
    if result["rows"]:
        console.print(f"next: sft trace {result['rows'][0]['row_id']}", style="dim")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"

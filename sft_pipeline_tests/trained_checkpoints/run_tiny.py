"""Builds trained_checkpoints on tiny data, as a process that can be killed or started under torchrun.

python -m sft_pipeline_tests.trained_checkpoints.run_tiny ROOT NAME CONFIG_JSON [kill-after-update N |
kill-in-save N]

What each rank trained on is written to ROOT/NAME.trained/rank<R>.jsonl, by update.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.trained_checkpoints.build import build
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
from sft_pipeline.store import Artifact
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline_tests.training import tiny


class Recorder(Reporter):
    """Keeps what is reported; dies after an update if told to."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.kill_after, self.lines, self.seen, self.sampled = kill_after, [], [], []

    def log(self, message: str, level: str = "info") -> None:
        self.lines.append((level, message))

    def metrics(self, values: Any, step: int) -> None:
        self.seen.append((step, dict(values)))
        if self.kill_after == step and "loss" in values:
            os.kill(os.getpid(), signal.SIGKILL)

    def samples(self, rows: Any, step: int) -> None:
        self.sampled.append((step, list(rows)))


def make(root: Path, **packed: Any) -> None:
    """The base model and the input artifacts."""
    tiny.base_folder(root / "base")
    tiny.packed_shards(root / "packed", **packed)
    tiny.tokenized_rows(root / "tokenized")


def config_of(
    root: Path, *, parameterization: str = "lora", lora: dict[str, Any] | None = None, **training: Any
) -> TrainedCheckpointsConfig:
    training = {"learning_rate": 5e-3, "eval_steps": 2, **training}
    model = ModelConfig(
        base=str(root / "base"),
        parameterization=parameterization,
        lora={"r": 4, "dropout": 0.1, **(lora or {})},
    )
    return TrainedCheckpointsConfig(model=model, training=TrainingConfig(**training))


def run(root: Path, name: str, report: Reporter | None = None, **config: Any) -> Built:
    """Builds into ROOT/NAME; ROOT/NAME-work survives."""
    out = root / name
    out.mkdir(exist_ok=True)
    inputs = {"packed_shards": Artifact(root / "packed"), "tokenized_rows": Artifact(root / "tokenized")}
    return build(
        Build(
            config=config_of(root, **config),
            inputs=inputs,
            out=out,
            work=root / f"{name}-work",
            report=report or Reporter(),
        )
    )


@contextlib.contextmanager
def recording_what_is_trained(folder: Path) -> Iterator[None]:
    """Writes the token ids of every example whose gradient was taken, as they reached the model, without
    padding.
    """
    from sft_pipeline.training.trainer import SupervisedTrainer

    folder.mkdir(exist_ok=True)
    path = folder / f"rank{os.environ.get('RANK', '0')}.jsonl"
    step = SupervisedTrainer.training_step

    def recording(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        loss = step(self, model, inputs, *more)
        rows = [
            [t for t in row if t]
            for m in inputs.microbatches
            if m.examples
            for row in m.inputs["input_ids"].tolist()
        ]
        with path.open("a") as stream:
            stream.write(json.dumps({"update": inputs.update, "rows": rows}) + "\n")
        return loss

    with mock.patch.object(SupervisedTrainer, "training_step", recording):
        yield


def main() -> None:
    root, name, config = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    how, number = (sys.argv[4], int(sys.argv[5])) if len(sys.argv) > 4 else (None, 0)
    if how == "kill-in-save":
        from sft_pipeline.training import checkpoint

        flush, calls = checkpoint.fsync_tree, []

        def die(folder: Path) -> None:
            calls.append(folder)
            if len(calls) == number:
                (folder / "model.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            flush(folder)

        checkpoint.fsync_tree = die
    with recording_what_is_trained(root / f"{name}.trained"):
        built = run(root, name, Recorder(number if how == "kill-after-update" else None), **config)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"counts": dict(built.counts), "checks": {c.name: c.passed for c in built.checks}}))


if __name__ == "__main__":
    main()

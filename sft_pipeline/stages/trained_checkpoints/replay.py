"""One update again: training resumes at the checkpoint before it and goes on to it; then rows are scored.

On the machine that trained, with one process, the weights are bit for bit those that met the update then, so
its loss and gradient norm come out again.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
from sft_pipeline.stages.trained_checkpoints.train import TrainingData, recipe_items, refuse_foreign
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.training.base import load_tokenizer
from sft_pipeline.training.checkpoint import latest_checkpoint
from sft_pipeline.training.data import Feed, layout_for, make_feed
from sft_pipeline.training.generate import score_nll
from sft_pipeline.training.model import load_for_training, training_device
from sft_pipeline.training.process import be_deterministic, keep_rng
from sft_pipeline.training.progress import Curves, Listener, NotFinite, UpdateNumbers
from sft_pipeline.training.schedule import Schedule
from sft_pipeline.training.shards import Plan, Shards
from sft_pipeline.training.trainer import SupervisedTrainer

TEXT = 120


@dataclass(frozen=True)
class RowLoss:
    """One row of the update. `loss` is per supervised token, without dropout; None where it is not finite."""

    row_id: str
    block: int
    loss: float | None
    supervised: int
    text: str


@dataclass(frozen=True)
class Replay:
    """What one update was, counted from 1. What the training recorded is None where it did not get that far.

    Attributes:
        checkpoint: The step that was gone on from; 0: the beginning.
        rows: The worst first.
    """

    update: int
    checkpoint: int
    loss: float | None
    grad_norm: float | None
    clip: float
    recorded_loss: float | None
    recorded_grad_norm: float | None
    rows: list[RowLoss] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def replay(
    config: TrainedCheckpointsConfig,
    data: TrainingData,
    training: Path,
    update: int,
    work: Path,
    report: Reporter,
) -> Replay:
    """Takes one update of a finished training apart.

    Args:
        training: The artifact's folder, with checkpoints and history.parquet.
        update: Counted from 1, as `global_step`.
        work: For what the trainer writes, if anything.

    Raises:
        InputError: There is no such update, the training ended before it, or a checkpoint belongs to other
            data.
    """
    settings = config.training
    plan, shards = Plan(data.plan), Shards(data.train)
    total = min(len(plan), settings.max_steps or len(plan))
    if not 1 <= update <= total:
        raise InputError(f"there is no update {update}: this training has the updates 1 to {total}")
    be_deterministic(settings.seed)
    device = training_device()
    resume = latest_checkpoint(training, report, before=update)
    if resume is not None:
        refuse_foreign(resume, data.identity(), recipe_items(config.model, settings))
    model, loaded = load_for_training(config.model, settings, resume.path if resume else None, device=device)
    tokenizer = load_tokenizer(config.model)
    layout = layout_for(device, loaded.attention)
    feed = make_feed(shards, plan, settings, layout=layout, updates=total)
    start = resume.step if resume else 0
    origin = f"checkpoint-{start}" if start else "the beginning"
    report.log(f"going on from {origin}; update {update} is {update - start} updates on")
    trainer = ReplayTrainer(
        model,
        feed=feed,
        validation=None,
        tokenizer=tokenizer,
        training=settings.model_copy(update={"report_to": []}),
        schedule=Schedule.of(settings, config.model),
        precision=loaded.precision,
        folder=work,
        listener=ReplayProgress(start, update, report),
        resume=resume,
    )
    trainer.examined = update
    try:
        trainer.run()
    except UpdateReplayed:
        pass
    except NotFinite as error:
        raise InputError(f"update {update} cannot be reached: {error}. Replay update {error.step}") from error
    curves = Curves.read(training / "history.parquet")
    loss, norm = (dict(curves.get(name)).get(update) for name in ("loss", "grad_norm"))
    return Replay(
        update,
        start,
        _finite(trainer.found_loss),
        _finite(trainer.found_norm),
        settings.clip,
        loss,
        norm,
        _rows(feed, update, trainer.row_losses, tokenizer),
    )


class UpdateReplayed(Exception):
    """The update has been replayed; it is not applied."""


class ReplayTrainer(SupervisedTrainer):
    """Trains up to an update and takes that one apart."""

    examined: int
    row_losses: list[tuple[float, float]]
    found_loss = found_norm = float("nan")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.state.global_step + 1 < self.examined:
            return super().training_step(model, inputs, num_items_in_batch)
        with keep_rng(), self.accelerator.autocast():
            self.row_losses = score_nll(
                model,
                [(e.input_ids.tolist(), e.labels, e.weights) for e in _examples(self.feed, self.examined)],
            )
        with suppress(NotFinite):
            super().training_step(model, inputs, num_items_in_batch)
            self.found_loss = self._now[0]
        grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        self.found_norm = float(torch.nn.utils.get_total_norm(grads)) / scale
        raise UpdateReplayed


class ReplayProgress(Listener):
    """The replaying trainer's listener."""

    def __init__(self, start: int, update: int, report: Reporter) -> None:
        self.start, self.update, self.report = start, update, report

    def updated(self, numbers: UpdateNumbers) -> None:
        done, total = numbers.step - self.start, self.update - 1 - self.start
        self.report.progress("training again", done, total, "updates")


@dataclass(frozen=True)
class _Example:
    """One example of an update: int32, int32, float32 [tokens] or None."""

    row_id: str
    block: int
    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None


def _examples(feed: Feed, update: int) -> list[_Example]:
    """Every example of an update."""
    found = []
    for number in feed.plan.blocks(update - 1):
        block = feed.shards.block(int(number))
        for row_id, start, length in zip(
            feed.shards.row_ids(int(number)), block.starts, block.lengths, strict=True
        ):
            cut = slice(int(start), int(start + length))
            weights = None if block.weights is None else block.weights[cut]
            found.append(_Example(row_id, int(number), block.input_ids[cut], block.labels[cut], weights))
    return found


def _rows(feed: Feed, update: int, losses: list[tuple[float, float]], tokenizer: Any) -> list[RowLoss]:
    rows = []
    for example, (nll, weight) in zip(_examples(feed, update), losses, strict=True):
        supervised = example.labels != IGNORE_LABEL
        text = tokenizer.decode(example.input_ids[supervised].tolist())[:TEXT]
        loss = _finite(nll / (weight or 1.0))
        rows.append(RowLoss(example.row_id, example.block, loss, int(supervised[1:].sum()), text))
    return sorted(rows, key=lambda r: -math.inf if r.loss is None else -r.loss)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""One update again: the training is taken up at the checkpoint before it, brought to it, and its rows are looked at.

On the machine that trained, with one process, the weights are bit for bit those that met the update then, so its loss
and gradient norm come out again.
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
from sft_pipeline.stages.trained_checkpoints.bundle import (
    Bundle,
    NotResumable,
    checkpoint_folders,
    read_bundle,
)
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
from sft_pipeline.stages.trained_checkpoints.resume import Restore, recipe_items, refuse_foreign
from sft_pipeline.stages.trained_checkpoints.train import Data
from sft_pipeline.stages.trained_checkpoints.watch import Curves
from sft_pipeline.training.feed import Feed, layout_for
from sft_pipeline.training.generate import score_nll
from sft_pipeline.training.model import load_for_training, training_device
from sft_pipeline.training.progress import NotFinite, UpdateNumbers
from sft_pipeline.training.schedule import Schedule
from sft_pipeline.training.settings import keep_rng
from sft_pipeline.training.setup import be_deterministic, load_tokenizer, make_feed
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
    """What one update was, counted from 1. The recorded numbers are None where the training did not get that far.

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
    config: TrainedCheckpointsConfig, data: Data, training: Path, update: int, work: Path, report: Reporter
) -> Replay:
    """
    Args:
        training: The artifact's folder, with checkpoints and history.parquet.
        update: Counted from 1, as `global_step`.
        work: For what the trainer writes, if anything.

    Raises:
        InputError: There is no such update, the training ended before it, or a checkpoint belongs to other data.
    """
    settings = config.training
    plan, shards = Plan(data.plan), Shards(data.train)
    total = min(len(plan), settings.max_steps or len(plan))
    if not 1 <= update <= total:
        raise InputError(f"there is no update {update}: this training has the updates 1 to {total}")
    be_deterministic(settings.seed)
    device = training_device()
    bundle = _before(training, update, report)
    if bundle is not None:
        refuse_foreign(bundle, data.identity(), recipe_items(config.model, settings))
    model, loaded = load_for_training(config.model, settings, bundle.path if bundle else None, device=device)
    tokenizer = load_tokenizer(config.model)
    layout = layout_for(device, loaded.attention)
    feed = make_feed(shards, plan, settings, layout=layout, updates=total)
    start = bundle.step if bundle else 0
    report.log(
        f"going on from {'checkpoint-' + str(start) if start else 'the beginning'}; update {update} is {update - start} updates on"
    )
    examiner = _Examiner(
        model,
        feed=feed,
        validation=None,
        tokenizer=tokenizer,
        training=settings.model_copy(update={"report_to": []}),
        schedule=Schedule.of(settings, config.model),
        precision=loaded.precision,
        folder=work,
        listener=_Progress(start, update, report),
        resume=(bundle.path, Restore(bundle, 0, 1, settings.seed)) if bundle else None,
    )
    examiner.examined = update
    try:
        examiner.run()
    except _Done:
        pass
    except NotFinite as error:
        raise InputError(f"update {update} cannot be reached: {error}. Replay update {error.step}") from error
    curves = Curves.read(training / "history.parquet")
    loss, norm = (dict(curves.get(name)).get(update) for name in ("loss", "grad_norm"))
    return Replay(
        update,
        start,
        _finite(examiner.found_loss),
        _finite(examiner.found_norm),
        settings.clip,
        loss,
        norm,
        _rows(feed, update, examiner.row_losses, tokenizer),
    )


def _before(training: Path, update: int, report: Reporter) -> Bundle | None:
    """The newest whole checkpoint that has not seen the update."""
    for path in reversed(checkpoint_folders(training)):
        if int(path.name.rpartition("-")[2]) < update:
            try:
                return read_bundle(path)
            except NotResumable as why:
                report.log(f"not going on from {path.name}: {why}", "warning")
    return None


class _Done(Exception):
    """The update has been looked at; it is not applied."""


class _Examiner(SupervisedTrainer):
    """Trains up to an update and takes that one apart."""

    examined: int
    row_losses: list[tuple[float, int]]
    found_loss = found_norm = float("nan")

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.state.global_step + 1 < self.examined:
            return super().training_step(model, inputs, num_items_in_batch)
        with keep_rng(), self.accelerator.autocast():
            self.row_losses = score_nll(
                model,
                [(i.tolist(), labels.tolist()) for _, _, i, labels in _examples(self.feed, self.examined)],
            )
        with suppress(NotFinite):
            super().training_step(model, inputs, num_items_in_batch)
            self.found_loss = self._now[0]
        grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        self.found_norm = float(torch.nn.utils.get_total_norm(grads)) / scale
        raise _Done


class _Progress:
    """The examiner's listener."""

    def __init__(self, start: int, update: int, report: Reporter) -> None:
        self.start, self.update, self.report = start, update, report

    def updated(self, numbers: UpdateNumbers) -> None:
        self.report.progress(
            "training again", numbers.step - self.start, self.update - 1 - self.start, "updates"
        )

    def evaluated(self, step: int, val_loss: float) -> None: ...

    def should_stop(self) -> bool:
        return False


def _examples(feed: Feed, update: int) -> list[tuple[str, int, np.ndarray, np.ndarray]]:
    """(row_id, block, input_ids, labels) of every example of an update."""
    found = []
    for number in feed.plan.blocks(update - 1):
        block = feed.shards.block(int(number))
        for row_id, start, length in zip(
            feed.shards.row_ids(int(number)), block.starts, block.lengths, strict=True
        ):
            cut = slice(int(start), int(start + length))
            found.append((row_id, int(number), block.input_ids[cut], block.labels[cut]))
    return found


def _rows(feed: Feed, update: int, losses: list[tuple[float, int]], tokenizer: Any) -> list[RowLoss]:
    rows = []
    for (row_id, block, ids, labels), (nll, count) in zip(_examples(feed, update), losses, strict=True):
        text = tokenizer.decode(ids[labels != -100].tolist())[:TEXT]
        rows.append(RowLoss(row_id, block, _finite(nll / max(1, count)), count, text))
    return sorted(rows, key=lambda r: -math.inf if r.loss is None else -r.loss)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

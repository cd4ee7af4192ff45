"""The trials on a copy of the model: the fullest micro-batch, overfitting a few rows, a short run."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from sft_pipeline.reporting import Reporter
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.data import Feed, Microbatch, microbatches
from sft_pipeline.training.loss import install_supervised_forward
from sft_pipeline.training.memory import peak_memory_mb
from sft_pipeline.training.progress import Curve, Intervals, Listener, NotFinite, UpdateNumbers
from sft_pipeline.training.schedule import Schedule
from sft_pipeline.training.shards import Block, Shards
from sft_pipeline.training.trainer import SupervisedTrainer

# Some twenty times a recipe's usual rates: the copy is thrown away, and learning has to show in a minute.
ADAPTER_OVERFIT_RATE, FULL_OVERFIT_RATE = 2e-3, 5e-4
# A loss that rises shows in a few blocks; the whole validation split would take minutes on a CPU.
EVALUATION_BLOCKS = 16


@dataclass(frozen=True)
class WorstMicrobatch:
    """One update's work on the fullest micro-batch.

    Attributes:
        blocks: Its block numbers.
        tokens: With padding.
        memory_mb: The peak, without the optimizer, which came later.
        seconds: Forward and backward.
    """

    blocks: tuple[int, ...]
    tokens: int
    supervised: int
    memory_mb: float
    seconds: float


def fullest_microbatch(model: Any, shards: Shards, feed: Feed, fullest: Sequence[int]) -> WorstMicrobatch:
    """Forward and backward over the fullest blocks of the whole plan, as one micro-batch.

    Args:
        fullest: Block numbers, the longest first, of equally long ones the most supervised.
    """
    blocks = [shards.block(i) for i in fullest[: feed.per_device_batch]]
    candidates = microbatches(
        blocks, layout=feed.layout, per_device_batch=feed.per_device_batch, max_tokens=feed.max_tokens
    )
    batch = max(candidates, key=lambda m: m.inputs["input_ids"].numel())
    model.train()
    began = time.monotonic()
    batch = batch.to(next(model.parameters()).device)
    _summed_loss(model, batch).backward()
    model.zero_grad(set_to_none=True)  # only their memory was wanted
    return WorstMicrobatch(
        tuple(b.block for b in blocks),
        batch.inputs["input_ids"].numel(),
        len(batch.targets),
        peak_memory_mb(),
        time.monotonic() - began,
    )


def _summed_loss(model: Any, m: Microbatch) -> torch.Tensor:
    """NLL of a micro-batch, summed over its supervised tokens."""
    return model(**m.inputs, supervised_index=m.index, supervised_targets=m.targets, reduction="sum")["nll"]


@dataclass(frozen=True)
class OverfitResult:
    """Losses per supervised token over the same rows; `target` is what had to be reached."""

    passed: bool
    rows: int
    losses: list[float]
    target: float
    learning_rate: float

    def __str__(self) -> str:
        change = f"{self.losses[0]:.3f} to {self.losses[-1]:.3f}"
        change += f" in {len(self.losses) - 1} updates on {self.rows} rows"
        if self.passed:
            return f"The loss fell from {change}."
        return (
            f"The loss only went from {change}, {self.target:.3f} was needed: nothing can be learned from "
            "these labels, or too little is trained (LoRA rank, frozen parts)"
        )


def overfit_rows(shards: Shards, feed: Feed, count: int) -> list[Block]:
    """The first `count` examples of the plan's first updates, each as a block of its own."""
    found: list[Block] = []
    for update in range(len(feed.plan)):
        for number in feed.plan.blocks(update):
            block = shards.block(int(number))
            for start, n in zip(block.starts, block.lengths, strict=True):
                cut = slice(int(start), int(start + n))
                ids, labels, positions = block.input_ids[cut], block.labels[cut], block.position_ids[cut]
                if (labels[1:] != IGNORE_LABEL).any():
                    found.append(Block(len(found), ids, labels, positions, np.array([n], dtype=np.int32)))
                if len(found) == count:
                    return found
    return found


def overfit(
    model: Any,
    rows: Sequence[Block],
    *,
    steps: int,
    fraction: float,
    adapters: bool,
    max_tokens: int,
    clip: float,
    report: Reporter,
) -> OverfitResult:
    """Trains on the same few rows with AdamW until the loss is `fraction` of its start, for at most `steps`
    updates.

    The rate is the trial's own: it tests whether the rows *can* be learned; the short run tests the recipe's
    rate. Where the first rate does not do, a second one is tried: a fifth of it if
    the loss rose, five times it if the loss fell too slowly.
    """
    install_supervised_forward(model)
    batches = microbatches(rows, layout="rows", per_device_batch=1, max_tokens=max_tokens)
    supervised = max(1, sum(len(m.targets) for m in batches))
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    start = [p.detach().clone() for p in parameters]

    def losses_at(rate: float) -> list[float]:
        """The loss per supervised token before each update, and at the end."""
        # Without weight decay, which would hold up the loss of rows that are learned exactly.
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
        losses: list[float] = []
        model.train()
        for step in range(steps + 1):
            total = 0.0
            for m in batches:
                nll = _summed_loss(model, m.to(device))
                (nll / supervised).backward()
                total += float(nll.detach())
            losses.append(total / supervised)
            report.progress("overfitting a few rows", step, steps, "updates")
            reached = losses[-1] <= fraction * losses[0]
            hopeless = not math.isfinite(losses[-1]) or losses[-1] > 3 * losses[0] + 1
            if step == steps or reached or hopeless:
                report.progress("overfitting a few rows", steps, steps, "updates")
                break
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        return losses

    rate = ADAPTER_OVERFIT_RATE if adapters else FULL_OVERFIT_RATE
    losses = losses_at(rate)
    if not losses[-1] <= fraction * losses[0]:  # a NaN is not
        other = rate * 5 if losses[-1] <= losses[0] else rate / 5
        report.log(
            f"the overfitting trial went from {losses[0]:.2f} to {losses[-1]:.2f} "
            f"at a learning rate of {rate:g}; trying {other:g}"
        )
        rate = other
        with torch.no_grad():
            for p, s in zip(parameters, start, strict=True):
                p.copy_(s)
        losses = losses_at(rate)
    target = fraction * losses[0]
    passed = math.isfinite(losses[-1]) and losses[-1] <= target
    return OverfitResult(passed, sum(len(b.lengths) for b in rows), losses, target, rate)


@dataclass
class ShortRun(Listener):
    """The curves of the short run, which it records as the trainer's listener, and what is wrong with them.

    Attributes:
        updates: To be made.
        seconds: Of each update.
        stride: See `stride`.
        failure: Why it stopped before its end.
    """

    updates: int = 0
    report: Reporter = field(default_factory=Reporter)
    loss: Curve = field(default_factory=list)
    val_loss: Curve = field(default_factory=list)
    grad_norm: Curve = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stride: float = 0.0
    failure: str | None = None

    def updated(self, numbers: UpdateNumbers) -> None:
        self.loss.append((numbers.step, numbers.loss))
        self.grad_norm.append((numbers.step, numbers.grad_norm))
        self.seconds.append(numbers.seconds)
        self.report.progress("short run", numbers.step, self.updates, "updates")

    def evaluated(self, step: int, val_loss: float) -> None:
        self.val_loss.append((step, val_loss))

    def problems(self) -> list[str]:
        """Divergence, oscillation and NaN, in words; empty when the run is sound."""
        if self.failure:
            return [self.failure]
        return instabilities(self.loss, self.val_loss, self.stride)


def stride(parameters: Sequence[torch.Tensor], learning_rate: float) -> float:
    """How far one AdamW update at this rate moves a trained weight, in units of the weights' own size.

    The size is the median of the tensors' RMS; those that start at zero, as half of an adapter does, have
    none. About 0.001 in a sound recipe.
    """
    norms = (float(p.detach().float().square().mean().sqrt()) for p in parameters if p.ndim > 1)
    sizes = [size for size in norms if size > 0]
    return learning_rate / median(sizes) if sizes else 0.0


def instabilities(loss: Curve, val_loss: Curve, stride: float = 0.0) -> list[str]:
    """What is wrong with a short run.

    Divergence: the validation loss, or the level of the training loss, gets well above its start.
    Oscillation: from update to update the loss jumps by half its level and more, without getting lower.
    Stride: an update moves weights by half their size and more, so that what they held is gone, whatever the
    loss of a few updates says. The bounds are wide: noise of a small batch must not stop a sound recipe.
    """
    found = []
    values = [v for _, v in loss]
    if any(not math.isfinite(v) for v in values + [v for _, v in val_loss]):
        return ["the loss is NaN or infinite"]
    if stride > 0.5:
        found.append(f"one update moves the trained weights by {stride:.1f} times their size")
    worst = max(val_loss[1:], key=lambda x: x[1], default=None)
    if worst and worst[1] > 1.1 * val_loss[0][1] + 0.05:
        found.append(
            f"the validation loss rose from {val_loss[0][1]:.3f} to {worst[1]:.3f} at update {worst[0]}"
        )
    quarter = max(1, len(values) // 4)
    first, last = mean(values[:quarter]), mean(values[-quarter:]) if values else 0.0
    if values and last > 1.3 * first + 0.05:
        found.append(f"the training loss rose from {first:.3f} to {last:.3f}")
    if len(values) >= 6:
        jumps = median(abs(b - a) for a, b in pairwise(values))
        if jumps > 0.5 * mean(values) and last > 0.9 * first:
            found.append(
                f"the loss oscillates by {jumps:.2f} from update to update around {mean(values):.2f}, "
                "without falling"
            )
    if values and max(values) > 4 * first + 2:
        found.append(f"the loss jumped to {max(values):.1f} from {first:.2f}")
    return found


def short_run(
    model: Any,
    feed: Feed,
    validation: Shards | None,
    tokenizer: Any,
    model_config: ModelConfig,
    training: TrainingConfig,
    *,
    steps: int,
    precision: str,
    folder: Path,
    report: Reporter,
) -> ShortRun:
    """The first updates of the plan with the recipe's optimizer and peak rate, its schedule compressed.

    Three evaluations: before, in the middle, after.
    """
    steps = min(steps, len(feed.plan))
    schedule = Schedule.of(training, model_config)
    trained = [p for p in model.parameters() if p.requires_grad]
    run = ShortRun(steps, report, stride=stride(trained, schedule.peak))
    # Compiling would take longer than these updates, and the trackers must not see a run of a trial.
    trial = training.model_copy(update={"report_to": [], "compile": False})
    trainer = SupervisedTrainer(
        model,
        feed=replace(feed, updates=steps),
        validation=validation,
        tokenizer=tokenizer,
        training=trial,
        schedule=schedule,
        precision=precision,
        folder=folder,
        listener=run,
        intervals=Intervals(steps, max(1, math.ceil(steps / 2)), steps),
    )
    try:
        trainer.run()
    except NotFinite as error:
        run.failure = str(error)
    return run

"""The trainer: TRL's SFTTrainer on packed shards.

What TRL and transformers do well is theirs: the loop, AdamW, clipping, mixed precision, data-parallel wrapping,
callbacks, reporting. Ours is what an update is. One item of the feed is one update of the plan, so a step of the loop,
an update of the optimizer, a position in the plan and `global_step` are the same number. Its loss is the mean over the
supervised tokens of the whole update: all micro-batches, all ranks.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from sft_pipeline.training.config import TrainingConfig
from sft_pipeline.training.feed import Feed, Microbatch, UpdateBatch, all_blocks
from sft_pipeline.training.loss import install_supervised_forward
from sft_pipeline.training.progress import Intervals, Listener, NotFinite, Restorer, Saver, UpdateNumbers
from sft_pipeline.training.schedule import Schedule, rate
from sft_pipeline.training.settings import arguments, assert_launch, assert_wrapped, keep_rng
from sft_pipeline.training.shards import Shards


class _Updates:
    """The feed as the loop's dataloader."""

    def __init__(self, feed: Feed, start: int) -> None:
        self.feed, self.start = feed, start

    def __len__(self) -> int:
        return self.feed.updates

    def __iter__(self) -> Iterator[UpdateBatch]:
        return self.feed.iterate(self.start)


class _Conductor(TrainerCallback):
    """Says when to evaluate, save and stop."""

    def __init__(self, trainer: "SupervisedTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        assert_wrapped(self.trainer.model_wrapped, self.trainer.feed.world)
        if state.global_step == 0 and self.trainer.validation is not None and self.trainer.evaluate_first:
            self.trainer.evaluate()
            self.trainer.clock = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        trainer = self.trainer
        state.epoch = state.global_step / max(1, trainer.feed.updates)
        trainer.finish_update(state.global_step)
        control.should_evaluate = trainer.validation is not None and trainer.intervals.evaluates(
            state.global_step
        )
        control.should_save = trainer.saver is not None and trainer.intervals.saves(state.global_step)

    def on_evaluate(self, args, state, control, **_):
        if self.trainer.listener.should_stop():
            control.should_training_stop = True
            control.should_save = self.trainer.saver is not None and state.global_step > 0


class SupervisedTrainer(SFTTrainer):
    """TRL's trainer over the update plan.

    Args:
        model: As `load_for_training` gives it.
        feed: Updates in plan order.
        validation: Held-out blocks, or None.
        tokenizer: Of the recipe; the trainer only reads its special tokens.
        precision: Resolved: bf16, fp16 or fp32.
        folder: Where TensorBoard files may go; nothing else is written there.
        resume: (folder holding a trainer_state.json, what puts optimizer and random state back), or None.
    """

    def __init__(
        self,
        model: Any,
        *,
        feed: Feed,
        validation: Shards | None,
        tokenizer: Any,
        training: TrainingConfig,
        schedule: Schedule,
        precision: str,
        folder: Path,
        listener: Listener,
        saver: Saver | None = None,
        resume: tuple[Path, Restorer] | None = None,
        intervals: Intervals | None = None,
        evaluate_first: bool = True,
    ) -> None:
        self.feed, self.validation, self.listener, self.saver, self.resume = (
            feed,
            validation,
            listener,
            saver,
            resume,
        )
        self.training, self.schedule, self.evaluate_first = training, schedule, evaluate_first
        self.intervals = intervals or Intervals.of(training, feed.updates)
        self.clock = time.monotonic()
        self._norm = self._rate = 0.0
        self._now: tuple[float, int, int, int] = (0.0, 0, 0, 0)
        cpu = next(model.parameters()).device.type == "cpu"
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(
            model=model,
            args=arguments(
                training, schedule, precision, folder, feed.updates, cpu=cpu, distributed=feed.world > 1
            ),
            # TRL wants a dataset to look at; the feed takes its place in get_train_dataloader.
            train_dataset=Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[-100, 0]]}),
            data_collator=list,  # type: ignore[arg-type]  # never called: the feed gives tensors
            processing_class=tokenizer,
            optimizers=(None, None),
        )
        for parameter, values in trained:
            # TRL rounds the adapters of a 4-bit model to bf16. Their values are put back, not only their dtype: a
            # resumed run would otherwise start from rounded weights.
            if parameter.dtype != values.dtype:
                parameter.data = values
        self.loss_path = install_supervised_forward(model)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Conductor(self))
        assert_launch(self.accelerator, feed.world)

    # What an update is

    def get_train_dataloader(self) -> Any:
        return _Updates(self.feed, self.resume[1].step if self.resume else 0)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Microbatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Summed NLL of a micro-batch, in fp32."""
        return model(
            **inputs.inputs, supervised_index=inputs.index, supervised_targets=inputs.targets, reduction="sum"
        )["nll"]

    def training_step(self, model: Any, inputs: UpdateBatch, num_items_in_batch: Any = None) -> torch.Tensor:  # type: ignore[override]
        """Forward and backward of a whole update. Returns its loss: mean NLL over its supervised tokens."""
        device, world = self.args.device, self.accelerator.num_processes
        model.train()
        counts = self._over_ranks(
            torch.tensor(
                [inputs.supervised, inputs.tokens, inputs.examples], dtype=torch.int64, device=device
            )
        )
        supervised, tokens, examples = counts.tolist()
        total = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        last = len(inputs.microbatches) - 1
        for i, microbatch in enumerate(inputs.microbatches):
            with contextlib.nullcontext() if i == last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager(), self.maybe_activation_offload_context:
                    nll = self.compute_loss(model, microbatch.to(device))
                # Data-parallel gradients are averaged over ranks, hence the factor.
                self.accelerator.backward(nll * (world / max(1, supervised)))
            total += nll.detach()
        loss = float(self._over_ranks(total)) / max(1, supervised)
        if not math.isfinite(loss):
            raise NotFinite(self.state.global_step + 1, "the loss", loss)
        self._now = (loss, examples, tokens, supervised)
        return torch.tensor(loss, device=device)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self._norm, self._rate = float(norm), self._get_learning_rate()
        if not math.isfinite(self._norm) and self.accelerator.scaler is None:
            raise NotFinite(self.state.global_step + 1, "the gradient norm", self._norm)
        return norm

    def finish_update(self, step: int) -> None:
        now = time.monotonic()
        loss, examples, tokens, supervised = self._now
        self.listener.updated(
            UpdateNumbers(step, loss, self._rate, self._norm, examples, tokens, supervised, now - self.clock)
        )
        if self.args.report_to:
            self.log(
                {
                    "loss": loss,
                    "learning_rate": self._rate,
                    "grad_norm": self._norm,
                    "supervised_tokens_per_second": supervised / max(1e-9, now - self.clock),
                }
            )
        self.clock = now

    def _over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        return (
            self.accelerator.reduce(value, reduction="sum") if self.accelerator.num_processes > 1 else value
        )

    # Optimizer and schedule

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            total, schedule = self.feed.updates, self.schedule
            inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            self.lr_scheduler = LambdaLR(inner, lambda update: rate(update, total, schedule) / schedule.peak)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation loss: summed NLL over supervised tokens, over all ranks; the training's random state is put back."""
        if self.validation is None:
            return {}
        with keep_rng():
            val_loss = self.validation_loss()
            step = self.state.global_step
            if step and not math.isfinite(val_loss):  # before a checkpoint of these weights is written
                raise NotFinite(step, "the validation loss", val_loss, applied=True)
            self.listener.evaluated(step, val_loss)
        metrics = {"eval_loss": val_loss}
        if self.args.report_to:
            self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.clock = time.monotonic()
        return metrics

    def validation_loss(self) -> float:
        device, feed = self.args.device, self.feed
        model: Any = self.model
        assert self.validation is not None
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with torch.no_grad(), self.accelerator.autocast():
            for microbatch in all_blocks(
                self.validation,
                layout=feed.layout,
                per_device_batch=feed.per_device_batch,
                max_tokens=feed.max_tokens,
                rank=feed.rank,
                world=feed.world,
            ):
                total[0] += self.compute_loss(model, microbatch.to(device)).double()
                total[1] += len(microbatch.targets)
        model.train(training)
        nll, supervised = self._over_ranks(total).tolist()
        return nll / max(1.0, supervised)

    # Checkpoints

    def run(self) -> int:
        """Trains to the end of the plan, or until the listener stops it. Returns the last update's number.

        Raises:
            NotFinite: The loss or gradient is not finite, and the update was not applied; or the validation loss is not.
        """
        self.train(resume_from_checkpoint=str(self.resume[0]) if self.resume else None)
        return self.state.global_step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.saver is not None
        self.saver(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are there already: `load_for_training` was given the checkpoint."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resume:
            self.resume[1].optimizer(self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """With the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resume:
            self.resume[1].rng(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._metrics["train"].clear()
        self._metrics["eval"].clear()
        super().log(logs, start_time)

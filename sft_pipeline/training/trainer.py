"""The trainer: the one place where TRL's SFTTrainer is set up.

What TRL and transformers do well is theirs: the loop, AdamW, clipping, mixed precision, data-parallel
wrapping, callbacks, reporting. Ours is what an update is. One item of the feed is one update of the plan, so
a step of the loop, an update of the optimizer, a position in the plan and `global_step` are the same number.
(In fp16 the gradient scaler skips an update whose gradient overflows; it keeps its number.) The loss of an
update is the mean over its supervised tokens, weighted where messages have loss weights: all micro-batches,
all ranks.

Overridden of their public methods: where batches come from (`get_train_dataloader`, `get_batch_samples`),
what an update and its loss are (`training_step`, `compute_loss`, `floating_point_ops`), the learning rate
(`create_scheduler`), and validation (`evaluate`). Of their private ones only `_clip_grad_norm`, and for a
resumed run `_initial_global_step` is set; both say why. Evaluating, saving and resuming need none:
`PlanCallback` does them at the right moments of the loop, whose own strategies for them are off.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from sft_pipeline.training.checkpoint import Checkpoint, load_training_state
from sft_pipeline.training.config import TrainingConfig
from sft_pipeline.training.data import Feed, Microbatch, UpdateBatch, all_blocks
from sft_pipeline.training.loss import causal_model, install_supervised_forward
from sft_pipeline.training.neftune import EmbeddingNoise, embedding_noise
from sft_pipeline.training.process import keep_rng
from sft_pipeline.training.progress import Intervals, Listener, NotFinite, UpdateNumbers
from sft_pipeline.training.schedule import Schedule, learning_rate
from sft_pipeline.training.shards import Shards

ROUTING = ("output_router_logits", "router_aux_loss_coef")


def training_arguments(
    training: TrainingConfig,
    schedule: Schedule,
    precision: str,
    folder: Path,
    updates: int,
    *,
    cpu: bool,
    distributed: bool,
) -> SFTConfig:
    """The recipe's training section in TRL's terms.

    Every setting is explicit whose default would do something else: bf16 on, checkpointing on, truncation at
    1,024.
    """
    return SFTConfig(
        output_dir=str(folder),
        max_steps=updates,
        per_device_train_batch_size=training.per_device_batch,
        gradient_accumulation_steps=1,
        # The optimizer is created with the peak rate, which create_scheduler multiplies for each update.
        learning_rate=schedule.peak,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.clip,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        activation_checkpointing=training.gradient_checkpointing,
        gradient_checkpointing=None,  # type: ignore[arg-type]
        activation_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        torch_compile=training.compile,
        # The loss is that of the supervised tokens alone, also for a mixture of experts: on, TRL has the
        # model return the logits of all its routers.
        router_aux_loss_coef=0.0,
        neftune_noise_alpha=None,  # embedding_noise adds it, by the length of each example
        max_length=None,
        packing=False,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and distributed else None,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        ignore_data_skip=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
        seed=training.seed,
        data_seed=training.seed,
    )


class FeedLoader:
    """The feed as the loop's dataloader, from update `start` (counted from 0) on."""

    def __init__(self, feed: Feed, start: int) -> None:
        self.feed, self.start = feed, start

    def __len__(self) -> int:
        return self.feed.updates

    def __iter__(self) -> Iterator[UpdateBatch]:
        return self.feed.iterate(self.start)


class PlanCallback(TrainerCallback):
    """Restores a resumed run as the loop begins; after an update evaluates, saves and stops as planned."""

    def __init__(self, trainer: "SupervisedTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **_):
        trainer = self.trainer
        wrapped, world = trainer.model_wrapped, trainer.feed.world
        if world > 1 and not isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
            raise AssertionError(
                f"{world} processes, but the model is a bare {type(wrapped).__name__}: "
                "gradients would not be summed"
            )
        if trainer.resume is not None:
            # Here optimizer and scheduler exist, and nothing draws random numbers between here and the first
            # update.
            load_training_state(trainer, trainer.resume)
            # Otherwise the final mean loss counts updates that were not made here.
            trainer._initial_global_step = state.global_step
        elif trainer.validation is not None and trainer.evaluate_first:
            trainer.evaluate()
        trainer.clock = time.monotonic()

    def on_step_end(self, args, state, control, **_):
        trainer, step = self.trainer, state.global_step
        state.epoch = step / max(1, trainer.feed.updates)
        scheduler: Any = trainer.lr_scheduler
        if scheduler.last_epoch < step:
            # The loop leaves the schedule where it is after an update that the gradient scaler skipped.
            scheduler.step()
        trainer.report_update(step)
        save = trainer.intervals.saves(step)
        if trainer.validation is not None and trainer.intervals.evaluates(step):
            trainer.evaluate()
            if trainer.listener.should_stop():
                control.should_training_stop = save = True
        if save and trainer.saver is not None:
            trainer.saver(trainer)
        # Last, so that the next update's seconds hold neither the evaluation nor the checkpoint.
        trainer.clock = time.monotonic()


class SupervisedTrainer(SFTTrainer):
    """TRL's trainer over the update plan.

    Args:
        model: As `load_for_training` gives it.
        feed: Updates in plan order.
        validation: Held-out blocks, or None.
        tokenizer: Of the recipe; the trainer only reads its special tokens.
        precision: Resolved: bf16, fp16 or fp32.
        folder: Where TensorBoard files may go; nothing else is written there.
        saver: Writes a checkpoint; called on every rank, after the evaluation of the same update.
        resume: The checkpoint whose weights the model already has; the rest is put back when training begins.
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
        saver: Callable[["SupervisedTrainer"], None] | None = None,
        resume: Checkpoint | None = None,
        intervals: Intervals | None = None,
        evaluate_first: bool = True,
    ) -> None:
        self.feed, self.validation, self.listener, self.saver = feed, validation, listener, saver
        self.training, self.schedule, self.resume = training, schedule, resume
        self.intervals = intervals or Intervals.of(training, feed.updates)
        self.evaluate_first = evaluate_first
        self.clock = time.monotonic()
        self._norm = self._rate = 0.0
        self._noise: EmbeddingNoise | None = None
        self._now: tuple[float, int, int, int] = (0.0, 0, 0, 0)
        cpu = next(model.parameters()).device.type == "cpu"
        text_config = causal_model(model).config.get_text_config()
        routing = {k: v for k, v in vars(text_config).items() if k in ROUTING}
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        super().__init__(
            model=model,
            args=training_arguments(
                training, schedule, precision, folder, feed.updates, cpu=cpu, distributed=feed.world > 1
            ),
            # TRL wants a dataset to look at; the feed takes its place in get_train_dataloader.
            train_dataset=Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[-100, 0]]}),
            data_collator=list,  # type: ignore[arg-type]  # never called: the feed gives tensors
            processing_class=tokenizer,
            optimizers=(None, None),
        )
        # TRL writes its choice of them into the model's configuration, with which it would be exported.
        for key, value in routing.items():
            setattr(text_config, key, value)
        for parameter, values in trained:
            # TRL rounds the adapters of a 4-bit model to bf16. Their values are put back, not only their
            # dtype: a resumed run would otherwise start from rounded weights.
            if parameter.dtype != values.dtype:
                parameter.data = values
        self.loss_path = install_supervised_forward(model)
        self.remove_callback(PrinterCallback)
        self.add_callback(PlanCallback(self))
        # Several launch mistakes train copies that never talk to each other; none of them may pass unseen.
        seen, kind = self.accelerator.num_processes, self.accelerator.distributed_type.value
        if seen != feed.world:
            raise AssertionError(
                f"launched as {feed.world} processes, but the trainer sees {seen} ({kind}): "
                "they would train unsynchronised copies"
            )
        if feed.world > 1 and kind not in ("MULTI_CPU", "MULTI_GPU"):
            raise AssertionError(
                f"{feed.world} processes under distributed type {kind}: gradients would not be summed"
            )

    def run(self) -> int:
        """Trains to the end of the plan, or until the listener stops it. Returns the last update's number.

        Raises:
            NotFinite: The loss or gradient is not finite, and the update was not applied; or the validation
                loss is not.
        """
        if self.resume is not None and self.resume.step >= self.feed.updates:
            return self.resume.step
        with embedding_noise(self.model, self.training.neftune_alpha) as self._noise:
            self.train()
        return self.state.global_step

    # What an update is

    def get_train_dataloader(self) -> Any:
        return FeedLoader(self.feed, self.resume.step if self.resume else 0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[UpdateBatch], num_batches: int, device: torch.device
    ) -> tuple[list[UpdateBatch], None]:
        """One update, whose tokens it has counted itself."""
        return [next(epoch_iterator)], None

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: Microbatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Summed (weighted) NLL of a micro-batch, in fp32."""
        if self._noise is not None:
            self._noise.about(inputs)
        return model(
            **inputs.inputs,
            supervised_index=inputs.index,
            supervised_targets=inputs.targets,
            supervised_weights=inputs.weights,
            reduction="sum",
        )["nll"]

    def training_step(self, model: Any, inputs: UpdateBatch, num_items_in_batch: Any = None) -> torch.Tensor:  # type: ignore[override]
        """Forward and backward of a whole update. Returns its loss: mean NLL over its supervised tokens."""
        device, world = self.args.device, self.accelerator.num_processes
        model.train()
        counts = [inputs.weight, inputs.supervised, inputs.tokens, inputs.examples]
        if world > 1:  # one process does not wait for its GPU to learn what it knows
            counts = self._over_ranks(torch.tensor(counts, dtype=torch.float64, device=device)).tolist()
        weight = counts[0] or 1.0
        supervised, tokens, examples = map(int, counts[1:])
        total = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        last = len(inputs.microbatches) - 1
        for i, microbatch in enumerate(inputs.microbatches):
            with contextlib.nullcontext() if i == last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager(), self.maybe_activation_offload_context:
                    nll = self.compute_loss(model, microbatch.to(device))
                # Data-parallel gradients are averaged over ranks, hence the factor.
                self.accelerator.backward(nll * (world / weight))
            total += nll.detach()
        loss = float(self._over_ranks(total)) / weight
        if not math.isfinite(loss):
            raise NotFinite(self.state.global_step + 1, "the loss", loss)
        self._now = (loss, examples, tokens, supervised)
        return torch.tensor(loss, device=device)

    def _clip_grad_norm(self, model: Any) -> Any:
        """As theirs. Private, but the only place with the norm while the update can still be refused.

        In fp16 a norm that is not finite is the gradient scaler's matter: it skips the update, lowers its
        scale, and training goes on.
        """
        norm = super()._clip_grad_norm(model)
        scheduler: Any = self.lr_scheduler
        self._norm, self._rate = float(norm), scheduler.get_last_lr()[0]
        if not math.isfinite(self._norm) and self.accelerator.scaler is None:
            raise NotFinite(self.state.global_step + 1, "the gradient norm", self._norm)
        return norm

    def report_update(self, step: int) -> None:
        """Tells the listener, and the trainer's own reporting where asked for, what the update was."""
        loss, examples, tokens, supervised = self._now
        seconds = time.monotonic() - self.clock
        # Not accelerate's `optimizer_step_was_skipped`: fused AdamW skips within its kernel, unseen by it.
        applied = math.isfinite(self._norm)
        self.listener.updated(
            UpdateNumbers(step, loss, self._rate, self._norm, examples, tokens, supervised, seconds, applied)
        )
        if self.args.report_to:
            logs = {"loss": loss, "learning_rate": self._rate, "grad_norm": self._norm}
            self.log(logs | {"supervised_tokens_per_second": supervised / max(1e-9, seconds)})

    def _over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value, reduction="sum")

    # Learning rate

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Where the learning rate is applied: update n is made with `learning_rate(n, total, schedule)`.

        torch's schedulers multiply: the optimizer was made with the peak, so each update takes its share of
        that.
        """
        total, schedule = self.feed.updates, self.schedule
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        self.lr_scheduler = LambdaLR(inner, lambda n: learning_rate(n, total, schedule) / schedule.peak)
        return self.lr_scheduler

    # Validation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validation loss: mean (weighted) NLL over supervised tokens, over all ranks.

        The training's random state is put back.
        """
        if self.validation is None:
            return {}
        with keep_rng():
            val_loss = self.validation_loss()
            step = self.state.global_step
            if step and not math.isfinite(val_loss):  # before a checkpoint of these weights is written
                raise NotFinite(step, "the validation loss", val_loss, applied=True)
            self.listener.evaluated(step, val_loss)
        if self.args.report_to:
            self.log({"eval_loss": val_loss})
        return {"eval_loss": val_loss}

    def validation_loss(self) -> float:
        """Mean NLL per supervised token of the held-out blocks, without gradients."""
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
                total[1] += microbatch.weight
        model.train(training)
        nll, weight = self._over_ranks(total).tolist()
        return nll / (weight or 1.0)

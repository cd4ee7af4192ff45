"""One training from packed shards to checkpoints, resumable at any moment. Every rank runs this."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints import state
from sft_pipeline.stages.trained_checkpoints.bundle import latest_whole, retire, write_bundle
from sft_pipeline.stages.trained_checkpoints.resume import (
    Division,
    Restore,
    as_item,
    divisions,
    recipe_items,
    refuse_foreign,
)
from sft_pipeline.stages.trained_checkpoints.watch import Curves, Watch
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.feed import Feed, layout_for
from sft_pipeline.training.flops import meter
from sft_pipeline.training.model import LoadReport, load_for_training, save_weights, training_device
from sft_pipeline.training.progress import NotFinite
from sft_pipeline.training.schedule import Schedule
from sft_pipeline.training.setup import SAMPLES, be_deterministic, load_tokenizer, make_feed, make_sampler
from sft_pipeline.training.shards import Plan, Shards
from sft_pipeline.training.trainer import SupervisedTrainer


@dataclass(frozen=True)
class Data:
    """What is read, and the digests that a resumed run must find unchanged.

    Attributes:
        train, validation, heldout: Parquet parts of packed_shards/train, packed_shards/validation and
            tokenized_rows/validation.
        formatting: formatting.json as a dict.
        data_manifest, eval_manifest: Content digests.
    """

    train: list[Path]
    validation: list[Path]
    heldout: list[Path]
    plan: Path
    formatting: Mapping[str, Any]
    data_manifest: Mapping[str, Any]
    eval_manifest: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """The items of a bundle that must not change under a resume."""
        return {
            "tokenizer_version": self.formatting["tokenizer_sha256"],
            "chat_template_version": self.formatting["template_sha256"],
            "data_manifest": dict(self.data_manifest),
            "eval_manifest": dict(self.eval_manifest),
        }


@dataclass
class Outcome:
    """What a training was."""

    loaded: LoadReport
    layout: str
    loss_path: str
    schedule: Schedule
    planned: int
    done: int
    stopped: str
    failure: NotFinite | None
    watch: Watch
    feed: Feed
    resumed_at: int
    divisions: list[Division]
    threads: int
    samples: list[dict[str, Any]] = field(default_factory=list)


def train(
    model_config: ModelConfig, training: TrainingConfig, data: Data, work: Path, report: Reporter
) -> Outcome:
    """Trains from the newest whole checkpoint in `work`, or from the beginning.

    Raises:
        InputError: Unknown base; a checkpoint that belongs to other data; a full disk.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    be_deterministic(training.seed)
    device = training_device()
    bundle = latest_whole(work, report if rank == 0 else Reporter())
    recipe = recipe_items(model_config, training)
    if bundle is not None:
        refuse_foreign(bundle, data.identity(), recipe)
        report.log(f"resuming after update {bundle.step}")
    divided = divisions(bundle, world, training.per_device_batch, report)
    report.log(f"loading {model_config.base}")
    model, loaded = load_for_training(model_config, training, bundle.path if bundle else None, device=device)
    tokenizer = load_tokenizer(model_config)
    plan, shards = Plan(data.plan), Shards(data.train)
    total = min(len(plan), training.max_steps or len(plan))
    feed = make_feed(
        shards,
        plan,
        training,
        layout=layout_for(device, loaded.attention),
        updates=total,
        rank=rank,
        world=world,
    )
    validation = Shards(data.validation) if data.validation else None
    report.log(
        f"{loaded.trainable_parameters:,} of {loaded.total_parameters:,} parameters are trained ({loaded.parameterization}, {loaded.precision}, {loaded.attention}, layout {feed.layout}); {total:,} updates"
    )
    watch = Watch(
        total=total,
        report=report,
        curves=Curves.read(bundle.path / "curves.parquet") if bundle else None,
        early_stopping=training.early_stopping,
        sampler=make_sampler(model, tokenizer, data.heldout, data.formatting, SAMPLES)
        if rank == 0 and data.heldout
        else None,
        mfu=meter(
            model,
            torch.cuda.get_device_name(device) if device.type == "cuda" else "",
            loaded.precision,
            world,
        ),
        speed_log=work / "throughput.jsonl" if rank == 0 else None,
        resumed_at=bundle.step if bundle else 0,
    )
    schedule = Schedule.of(training, model_config)
    trainer = SupervisedTrainer(
        model,
        feed=feed,
        validation=validation if validation is not None and len(validation) else None,
        tokenizer=tokenizer,
        training=training,
        schedule=schedule,
        precision=loaded.precision,
        folder=work / "trainer",
        listener=watch,
        saver=_Saver(
            work,
            model_config,
            {**data.identity(), "recipe": recipe, "divisions": as_item(divided)},
            watch,
            training.keep_checkpoints,
        ),
        resume=(bundle.path, Restore(bundle, rank, world, training.seed)) if bundle else None,
    )
    failure = None
    try:
        # A run that was killed after it had stopped early must not go on.
        done = bundle.step if bundle and watch.should_stop() else trainer.run()
    except NotFinite as error:
        failure, done = error, error.step if error.applied else error.step - 1
        report.log(
            f"{error}; {'' if error.applied else 'the update was not applied and '}the run ends here. The last good checkpoint is kept",
            "error",
        )
    stopped = (
        str(failure)
        if failure
        else watch.stop_reason() or ("max_steps reached" if total < len(plan) else "plan finished")
    )
    if rank == 0:  # a run that was killed between its last checkpoint and this has one too many
        retire(work, training.keep_checkpoints, watch.best[0] if watch.best else None)
    samples = watch.samples or (list(watch.sampler()) if watch.sampler and not failure else [])
    return Outcome(
        loaded,
        feed.layout,
        trainer.loss_path,
        schedule,
        total,
        done,
        stopped,
        failure,
        watch,
        feed,
        bundle.step if bundle else 0,
        divided,
        torch.get_num_threads(),
        samples,
    )


class _Saver:
    """Writes the eleven items, and with them `of_run`: what is the same in every checkpoint of this run. All ranks
    take part in gathering; rank 0 writes."""

    def __init__(
        self, work: Path, model_config: ModelConfig, of_run: dict[str, Any], watch: Watch, keep: int | None
    ) -> None:
        self.work, self.model_config, self.of_run, self.watch, self.keep = (
            work,
            model_config,
            of_run,
            watch,
            keep,
        )

    def __call__(self, trainer: SupervisedTrainer) -> None:
        states = state.all_rng_states()
        step = trainer.state.global_step
        if trainer.is_world_process_zero():
            best = self.watch.best
            values = {
                "global_step": step,
                "sampler_position": {"update": step, "of": trainer.feed.updates},
                **self.of_run,
                "best_metric": {"name": "val_loss", "value": best[1], "step": best[0]}
                if best
                else {"name": "val_loss", "value": None, "step": None},
            }
            write_bundle(self.work, step, lambda folder: self._files(trainer, folder, states), values)
            retire(self.work, self.keep, best[0] if best else None)
        trainer.accelerator.wait_for_everyone()

    def _files(
        self, trainer: SupervisedTrainer, folder: Path, states: list[dict[str, Any]]
    ) -> dict[str, list[str]]:
        save_weights(trainer.model, folder, self.model_config)
        files = {"model": [p.name for p in folder.iterdir()]}
        files["optimizer"] = state.save_optimizer(
            trainer.optimizer, trainer.model, folder, trainer.accelerator.scaler
        )
        files["scheduler"] = state.save_scheduler(trainer.lr_scheduler, folder)
        files["rng"] = state.save_rng(states, folder)
        self.watch.curves.write(folder / "curves.parquet")
        files["curves"] = ["curves.parquet"]
        files["trainer_state"] = state.save_trainer_state(trainer.state, folder)
        return files

"""One training from packed shards to checkpoints, resumable at any moment. Every rank runs this."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints.watch import Watch
from sft_pipeline.training.base import load_tokenizer
from sft_pipeline.training.checkpoint import (
    Checkpoint,
    all_rng_states,
    latest_checkpoint,
    retire_checkpoints,
    save_training_state,
    write_checkpoint,
)
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.data import Feed, layout_for, make_feed
from sft_pipeline.training.flops import meter
from sft_pipeline.training.generate import SAMPLES, make_sampler
from sft_pipeline.training.model import LoadReport, load_for_training, save_weights, training_device
from sft_pipeline.training.process import be_deterministic
from sft_pipeline.training.progress import Curves, NotFinite
from sft_pipeline.training.schedule import Schedule
from sft_pipeline.training.shards import Plan, Shards
from sft_pipeline.training.trainer import SupervisedTrainer

# Names of folders, which may differ from machine to machine: their content is in the stage's fingerprint.
NAMES_OF_FOLDERS = ("model.base", "model.tokenizer")


@dataclass(frozen=True)
class TrainingData:
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
        """The items of a checkpoint that must not change under a resume."""
        return {
            "tokenizer_version": self.formatting["tokenizer_sha256"],
            "chat_template_version": self.formatting["template_sha256"],
            "data_manifest": dict(self.data_manifest),
            "eval_manifest": dict(self.eval_manifest),
        }


@dataclass(frozen=True)
class BatchLayout:
    """How updates are divided over processes and micro-batches, from one update (counted from 1) on.

    It changes neither which rows an update holds nor the order of updates, so a resumed run may have another.
    """

    from_update: int
    processes: int
    per_device_batch: int

    @property
    def words(self) -> str:
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{processes} with micro-batches of {self.per_device_batch}"


@dataclass
class TrainingOutcome:
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
    batch_layouts: list[BatchLayout]
    threads: int
    samples: list[dict[str, Any]] = field(default_factory=list)


def train(
    model_config: ModelConfig, training: TrainingConfig, data: TrainingData, work: Path, report: Reporter
) -> TrainingOutcome:
    """Trains from the newest whole checkpoint in `work`, or from the beginning.

    Raises:
        InputError: Unknown base; a checkpoint that belongs to other data; a full disk.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    be_deterministic(training.seed)
    device = training_device()
    resume = latest_checkpoint(work, report if rank == 0 else Reporter())
    recipe = recipe_items(model_config, training)
    if resume is not None:
        refuse_foreign(resume, data.identity(), recipe)
        report.log(f"resuming after update {resume.step}")
    batch_layouts = batch_layouts_so_far(resume, world, training.per_device_batch, report)
    report.log(f"loading {model_config.base}")
    model, loaded = load_for_training(model_config, training, resume.path if resume else None, device=device)
    tokenizer = load_tokenizer(model_config)
    plan, shards = Plan(data.plan), Shards(data.train)
    total = min(len(plan), training.max_steps or len(plan))
    layout = layout_for(device, loaded.attention)
    feed = make_feed(shards, plan, training, layout=layout, updates=total, rank=rank, world=world)
    validation = Shards(data.validation) if data.validation else None
    report.log(
        f"{loaded.trainable_parameters:,} of {loaded.total_parameters:,} parameters are trained "
        f"({loaded.parameterization}, {loaded.precision}, {loaded.attention}, layout {feed.layout}); "
        f"{total:,} updates"
    )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    sampled = rank == 0 and data.heldout
    watch = Watch(
        total=total,
        report=report,
        curves=Curves.read(resume.path / "curves.parquet") if resume else None,
        early_stopping=training.early_stopping,
        sampler=make_sampler(model, tokenizer, data.heldout, data.formatting, SAMPLES) if sampled else None,
        mfu=meter(model, gpu, loaded.precision, world),
        speed_log=work / "throughput.jsonl" if rank == 0 else None,
        resumed_at=resume.step if resume else 0,
    )
    schedule = Schedule.of(training, model_config)
    of_run = {**data.identity(), "recipe": recipe, "divisions": [asdict(b) for b in batch_layouts]}
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
        saver=CheckpointSaver(work, model_config, of_run, watch, training.keep_checkpoints),
        resume=resume,
    )
    failure = None
    try:
        # A run that was killed after it had stopped early must not go on.
        done = resume.step if resume and watch.should_stop() else trainer.run()
    except NotFinite as error:
        failure, done = error, error.step if error.applied else error.step - 1
        applied = "" if error.applied else "the update was not applied and "
        report.log(f"{error}; {applied}the run ends here. The last good checkpoint is kept", "error")
    finished = "max_steps reached" if total < len(plan) else "plan finished"
    if rank == 0:
        # A run that was killed after its last checkpoint may have kept one checkpoint more than
        # keep_checkpoints.
        retire_checkpoints(work, training.keep_checkpoints, watch.best[0] if watch.best else None)
    return TrainingOutcome(
        loaded=loaded,
        layout=feed.layout,
        loss_path=trainer.loss_path,
        schedule=schedule,
        planned=total,
        done=done,
        stopped=str(failure) if failure else watch.stop_reason() or finished,
        failure=failure,
        watch=watch,
        feed=feed,
        resumed_at=resume.step if resume else 0,
        batch_layouts=batch_layouts,
        threads=torch.get_num_threads(),
        samples=watch.samples or (list(watch.sampler()) if watch.sampler and not failure else []),
    )


class CheckpointSaver:
    """Writes a checkpoint of a trainer. All ranks take part in gathering their random states; rank 0 writes.

    Args:
        of_run: Items that are the same in every checkpoint of this run.
    """

    def __init__(
        self, work: Path, model_config: ModelConfig, of_run: dict[str, Any], watch: Watch, keep: int | None
    ) -> None:
        self.work, self.model_config, self.of_run = work, model_config, of_run
        self.watch, self.keep = watch, keep

    def __call__(self, trainer: SupervisedTrainer) -> None:
        states, step = all_rng_states(), trainer.state.global_step

        def write(folder: Path) -> dict[str, list[str]]:
            save_weights(trainer.model, folder, self.model_config)
            files = {"model": [p.name for p in folder.iterdir()]}
            self.watch.curves.write(folder / "curves.parquet")
            return files | {"curves": ["curves.parquet"]} | save_training_state(trainer, folder, states)

        if trainer.is_world_process_zero():
            best_step, best = self.watch.best or (None, None)
            values = {
                "global_step": step,
                "sampler_position": {"update": step, "of": trainer.feed.updates},
                **self.of_run,
                "best_metric": {"name": "val_loss", "value": best, "step": best_step},
            }
            write_checkpoint(self.work, step, write, values)
            retire_checkpoints(self.work, self.keep, best_step)
        trainer.accelerator.wait_for_everyone()


# What may differ from the run that made a checkpoint, and what is refused


def batch_layouts_so_far(
    resume: Checkpoint | None, world: int, per_device_batch: int, report: Reporter
) -> list[BatchLayout]:
    """Those of the run so far, and the one from here on where it is another; a change is reported.

    A resume with the same one adds nothing, so that a run that was killed ends with the files of one that was
    not.
    """
    now = BatchLayout(resume.step + 1 if resume else 1, world, per_device_batch)
    before = [BatchLayout(**d) for d in resume.value("divisions")] if resume else []
    if before and (before[-1].processes, before[-1].per_device_batch) == (world, per_device_batch):
        return before
    if before:
        report.log(
            f"update {now.from_update} and those after it are made by {now.words}, "
            f"those before by {before[-1].words}: updates keep their rows and their order",
            "warning",
        )
    return [*before, now]


def recipe_items(model: ModelConfig, training: TrainingConfig) -> dict[str, Any]:
    """Every key of the recipe that shapes the result, flat: {"training.seed": 42, ...}."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix.rstrip("."): value}
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}

    found = flat({"model": model.identity(), "training": training.identity()})
    return {k: v for k, v in found.items() if k not in NAMES_OF_FOLDERS}


def refuse_foreign(checkpoint: Checkpoint, data: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that another training made.

    Args:
        data: Identity of the data, by item of the checkpoint.
        recipe: As `recipe_items` gives it.

    Raises:
        InputError: The checkpoint was made with other data, another update plan, template, tokenizer or
            recipe.
    """

    def foreign(why: str, there: Any, here: Any) -> InputError:
        there, here = (t if len(t) < 60 else t[:57] + "..." for t in (str(there), str(here)))
        return InputError(
            f"{checkpoint.path} cannot be resumed: {why} ({there} there, {here} here). "
            "Delete the folder to train anew"
        )

    for item, value in data.items():
        if checkpoint.value(item) != value:
            raise foreign(f"its {item} is not that of the inputs", checkpoint.value(item), value)
    there = checkpoint.value("recipe")
    for key in sorted(there.keys() | recipe.keys()):
        if there.get(key) != recipe.get(key):
            raise foreign(f"it was made with another {key}", there.get(key), recipe.get(key))

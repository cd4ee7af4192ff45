"""Builds trained_checkpoints: reads the inputs, trains, and writes down what happened."""

import contextlib
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.spread import spread
from sft_pipeline.stages.stage import Build, Built, Check, number, table
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
from sft_pipeline.stages.trained_checkpoints.diagnosis import UpdateRows, diagnose, diagnosis_check
from sft_pipeline.stages.trained_checkpoints.report import evidence, write_plots
from sft_pipeline.stages.trained_checkpoints.train import TrainingData, TrainingOutcome, train
from sft_pipeline.stages.trained_checkpoints.watch import write_throughput
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.reply import formatting_of
from sft_pipeline.training.checkpoint import NotResumable, checkpoint_folders, read_checkpoint, step_of
from sft_pipeline.training.data import Feed
from sft_pipeline.training.process import set_tensorboard_folder
from sft_pipeline.training.reporters import require_reporters

COUNTS = ("examples", "tokens", "supervised_tokens")


@dataclass(frozen=True)
class TrainingTotals:
    """Sums over updates; supervised: tokens that carry loss."""

    updates: int
    examples: int
    tokens: int
    supervised: int


def build(b: Build) -> Built:
    """Every rank trains; rank 0 writes. What other ranks return is not used."""
    config: TrainedCheckpointsConfig = b.config
    require_reporters(config.training)
    b.work.mkdir(parents=True, exist_ok=True)
    set_tensorboard_folder(b.work / "tensorboard")
    data = read_data(b.inputs["packed_shards"], b.inputs["tokenized_rows"])
    outcome = train(config.model, config.training, data, b.work, b.report)
    if os.environ.get("RANK", "0") != "0":
        return Built(counts={})
    b.report.log("writing the checkpoints and curves")
    keep_checkpoints(b.work, b.out)
    if (b.work / "tensorboard").is_dir():
        shutil.copytree(b.work / "tensorboard", b.out / "tensorboard")
    curves = outcome.watch.curves
    curves.write(b.out / "history.parquet")
    write_throughput(outcome.watch.speed, b.out / "throughput.parquet")

    def rows_of(step: int) -> UpdateRows:
        blocks = [int(block) for block in outcome.feed.plan.blocks(step - 1)]
        command = f"sft replay {b.work.name[:12]} --update {step}"
        return UpdateRows(blocks, outcome.feed.row_ids(step - 1), command)

    consumed = TrainingTotals(outcome.done, *(curves.total(n) for n in COUNTS))
    val_loss = dict(curves.get("val_loss"))
    checkpoints = [
        {"path": p.name, "step": step_of(p), "val_loss": val_loss.get(step_of(p))}
        for p in checkpoint_folders(b.out)
    ]
    per_update = {name: asdict(spread([value for _, value in curves.get(name)])) for name in COUNTS}
    write_json(b.out / "training.json", summary(config, outcome, consumed, checkpoints, per_update))
    findings = diagnose(curves.get("loss"), curves.get("val_loss"), rows_of)
    write_json(b.out / "diagnosis.json", {"format": 1, "findings": [asdict(f) for f in findings]})
    write_plots(b.out, curves)
    return Built(
        counts={
            "updates": outcome.done,
            "updates_planned": outcome.planned,
            "examples": consumed.examples,
            "tokens": consumed.tokens,
            "supervised_tokens": consumed.supervised,
            "checkpoints": len(checkpoints),
            "parameters": outcome.loaded.total_parameters,
            "trainable_parameters": outcome.loaded.trainable_parameters,
        },
        checks=(
            finite_loss(outcome, rows_of(outcome.failure.step) if outcome.failure else None),
            checkpoints_resumable(b.out),
            budget_as_planned(consumed, planned_totals(outcome.feed, outcome.done), outcome),
            diagnosis_check(findings),
        ),
        volatile=("plots/", "throughput.parquet", "tensorboard/", "diagnosis.json"),
        evidence=evidence(outcome, checkpoints, per_update),
    )


def read_data(packed: Artifact, tokenized: Artifact) -> TrainingData:
    """What the training reads, with the content digests that a resumed run must find unchanged.

    Raises:
        InputError: formatting.json cannot be read.
    """
    hashes = {f.path: f.sha256 for f in packed.manifest.files}

    def below(folder: str) -> dict[str, str]:
        return {p: h for p, h in sorted(hashes.items()) if p.startswith(folder)}

    return TrainingData(
        train=packed.parts("train"),
        validation=packed.parts("validation"),
        heldout=tokenized.parts("validation"),
        plan=packed.file("plan.parquet"),
        formatting=formatting_of(tokenized),
        data_manifest={"plan": hashes["plan.parquet"], "train": below("train/")},
        eval_manifest={"validation": below("validation/")},
    )


def keep_checkpoints(work: Path, out: Path) -> None:
    """Hard-links the whole checkpoints into the artifact, or copies them where the disk cannot."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for folder in checkpoint_folders(work):
        with contextlib.suppress(NotResumable):
            read_checkpoint(folder)
            shutil.copytree(folder, out / folder.name, copy_function=link)


def summary(
    config: TrainedCheckpointsConfig,
    outcome: TrainingOutcome,
    consumed: TrainingTotals,
    checkpoints: list[dict[str, Any]],
    per_update: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """training.json: every value that ran. Nothing of the clock or the machine's speed."""
    best, training, model = outcome.watch.best, config.training, config.model
    return {
        "format": 1,
        "model": {"base": model.base, "revision": model.revision, **asdict(outcome.loaded)},
        "layout": outcome.layout,
        "blocks_per_update": training.planned_blocks,
        "divisions": [asdict(b) for b in outcome.batch_layouts],
        "loss": outcome.loss_path,
        "optimizer": {
            "name": "AdamW",
            "betas": list(training.adam_betas),
            "epsilon": training.adam_epsilon,
            "weight_decay": training.weight_decay,
            "clip": training.clip,
        },
        "schedule": asdict(outcome.schedule),
        "lora": model.lora.model_dump(mode="json") if model.parameterization != "full" else None,
        "seed": training.seed,
        "updates": {"planned": outcome.planned, "done": outcome.done},
        "examples": consumed.examples,
        "tokens": consumed.tokens,
        "supervised_tokens": consumed.supervised,
        "per_update": per_update,
        "stopped": outcome.stopped,
        "best": {"step": best[0], "val_loss": best[1]} if best else None,
        "checkpoints": checkpoints,
    }


def planned_totals(feed: Feed, updates: int) -> TrainingTotals:
    """What the plan says the first `updates` updates hold; where it does not say, its blocks are counted.

    Either way apart from the code that lays blocks out for the model.
    """
    planned = [feed.plan.planned(name, updates) for name in ("examples", "tokens", "supervised")]
    examples, tokens, supervised = planned
    if examples is None or tokens is None or supervised is None:
        examples = tokens = supervised = 0
        for update in range(updates):
            for block_number in feed.plan.blocks(update):
                block = feed.shards.block(int(block_number))
                scored = (block.labels != IGNORE_LABEL) & (block.position_ids != 0)
                examples += len(block.lengths)
                tokens += len(block.input_ids)
                supervised += int(np.count_nonzero(scored))
    return TrainingTotals(updates, examples, tokens, supervised)


def finite_loss(outcome: TrainingOutcome, rows: UpdateRows | None) -> Check:
    """A loss or gradient that is NaN or infinite; `rows` are those of the update that had it.

    Updates that fp16's gradient scaler skips are normal, as long as it does not skip all.
    """
    if outcome.failure is None or rows is None:
        skipped = [step for step, _ in outcome.watch.curves.get("skipped")]
        if not skipped:
            return Check("finite_loss", True, f"All {outcome.done} updates had a finite loss and gradient.")
        return Check(
            "finite_loss",
            len(skipped) < outcome.done,
            f"All {outcome.done} updates had a finite loss; the gradient of {len(skipped)} overflowed in "
            f"fp16, so they were not applied: update {', '.join(map(str, skipped[:10]))}"
            + (" and others." if len(skipped) > 10 else "."),
            {"skipped": number(len(skipped))},
        )
    applied = "the weights are spoiled" if outcome.failure.applied else "it was not applied"
    return Check(
        "finite_loss",
        False,
        f"{outcome.failure}: {applied}, and the run stopped. Lower training.learning_rate or training.clip, "
        f"or correct the rows of this update: {rows.words}",
        {"update": number(outcome.failure.step), "rows": table([{"row_id": r} for r in rows.row_ids[:20]])},
    )


def checkpoints_resumable(out: Path) -> Check:
    """Reads every checkpoint back, as a resumed run would."""
    name, bad, good = "checkpoints_resumable", [], 0
    for folder in checkpoint_folders(out):
        try:
            read_checkpoint(folder)
            good += 1
        except NotResumable as why:
            bad.append({"checkpoint": folder.name, "why": str(why)})
    if bad:
        words = f"{len(bad)} of {good + len(bad)} checkpoints cannot be resumed: {bad[0]['why']}"
        return Check(name, False, words, {"checkpoints": table(bad)})
    if not good:
        return Check(name, False, "The run ended before the first checkpoint: set training.save_steps lower")
    return Check(name, True, f"{good} checkpoints, each with all required items, hashes verified.")


def budget_as_planned(consumed: TrainingTotals, planned: TrainingTotals, outcome: TrainingOutcome) -> Check:
    """What the updates consumed is what the plan says of them, and a run that is shorter says why."""
    rows = [
        {"what": name, "planned": value, "consumed": getattr(consumed, name)}
        for name, value in asdict(planned).items()
    ]
    stopped_early = outcome.failure is not None or outcome.stopped.startswith("early stopping")
    wrong = [
        f"{r['what']}: {r['consumed']:,} consumed, {r['planned']:,} planned"
        for r in rows
        if r["planned"] != r["consumed"]
    ]
    if not wrong and outcome.done < outcome.planned and not stopped_early:
        wrong = [f"{outcome.done} of {outcome.planned} updates were made, and nothing says why"]
    words = "; ".join(wrong) or (
        f"{consumed.updates:,} updates, {consumed.examples:,} examples, "
        f"{consumed.supervised:,} supervised tokens, as planned ({outcome.stopped})."
    )
    return Check("budget_as_planned", not wrong, words, {"budget": table(rows)})

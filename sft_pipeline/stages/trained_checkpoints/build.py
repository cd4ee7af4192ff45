"""Builds trained_checkpoints: reads the inputs, trains, and writes down what happened."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, markdown, number, plot, table
from sft_pipeline.stages.trained_checkpoints.budget import Budget, planned_budget, spread
from sft_pipeline.stages.trained_checkpoints.bundle import NotResumable, checkpoint_folders, read_bundle
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
from sft_pipeline.stages.trained_checkpoints.diagnosis import Finding, Members, diagnose
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json
from sft_pipeline.training import plots


def build(b: Build) -> Built:
    """Every rank trains; rank 0 writes. What other ranks return is not used."""
    from sft_pipeline.stages.trained_checkpoints.train import train

    config: TrainedCheckpointsConfig = b.config
    rank = int(os.environ.get("RANK", "0"))
    b.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(b.work / "tensorboard"))
    data = read_data(b.inputs["packed_shards"], b.inputs["tokenized_rows"])
    outcome = train(config.model, config.training, data, b.work, b.report)
    if rank != 0:
        return Built(counts={})
    b.report.log("writing the checkpoints and curves")
    keep_checkpoints(b.work, b.out)
    if (b.work / "tensorboard").is_dir():
        shutil.copytree(b.work / "tensorboard", b.out / "tensorboard")
    curves = outcome.watch.curves
    curves.write(b.out / "history.parquet")
    from sft_pipeline.stages.trained_checkpoints.watch import write_throughput

    write_throughput(outcome.watch.speed, b.out / "throughput.parquet")
    members = functools.partial(_members, outcome.feed, b.work.name)
    findings = diagnose(curves.get("loss"), curves.get("val_loss"), members)
    consumed = Budget(outcome.done, *(curves.total(n) for n in ("examples", "tokens", "supervised_tokens")))
    checkpoints = [read_summary(p, curves.get("val_loss")) for p in checkpoint_folders(b.out)]
    write_json(b.out / "training.json", summary(config, outcome, consumed, checkpoints, findings))
    _plots(b.out, curves)
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
            _finite(outcome, members),
            _resumable(b.out),
            _as_planned(consumed, planned_budget(outcome.feed, outcome.done), outcome),
            _diagnosis(findings),
        ),
        volatile=("plots/", "throughput.parquet", "tensorboard/"),
        evidence=_evidence(outcome, consumed, checkpoints),
    )


def read_data(packed: Artifact, tokenized: Artifact) -> Any:
    """What the training reads, with the content digests that a resumed run must find unchanged.

    Raises:
        InputError: formatting.json cannot be read.
    """
    from sft_pipeline.stages.trained_checkpoints.train import Data

    path = tokenized.file("formatting.json")
    try:
        formatting = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable ({error}). Delete the artifact's folder to have it rebuilt"
        ) from error
    hashes = {f.path: f.sha256 for f in packed.manifest.files}
    return Data(
        train=packed.parts("train"),
        validation=packed.parts("validation"),
        heldout=tokenized.parts("validation"),
        plan=packed.file("plan.parquet"),
        formatting=formatting,
        data_manifest={
            "plan": hashes["plan.parquet"],
            "train": {p: h for p, h in sorted(hashes.items()) if p.startswith("train/")},
        },
        eval_manifest={
            "validation": {p: h for p, h in sorted(hashes.items()) if p.startswith("validation/")}
        },
    )


def keep_checkpoints(work: Path, out: Path) -> None:
    """Hard-links the whole checkpoints into the artifact, or copies them where the disk cannot."""
    for folder in checkpoint_folders(work):
        with contextlib.suppress(NotResumable):
            read_bundle(folder)
            target = out / folder.name
            target.mkdir()
            for path in sorted(folder.rglob("*")):
                to = target / path.relative_to(folder)
                if path.is_dir():
                    to.mkdir()
                    continue
                try:
                    os.link(path, to)
                except OSError:
                    shutil.copy2(path, to)


def read_summary(folder: Path, val_loss: list[tuple[int, float]]) -> dict[str, Any]:
    step = int(folder.name.rpartition("-")[2])
    return {"path": folder.name, "step": step, "val_loss": dict(val_loss).get(step)}


def summary(
    config: TrainedCheckpointsConfig,
    outcome: Any,
    consumed: Budget,
    checkpoints: list[dict[str, Any]],
    findings: list[Finding],
) -> dict[str, Any]:
    """training.json: every value that ran. Nothing of the clock or the machine's speed."""
    best = outcome.watch.best
    training = config.training
    return {
        "format": 1,
        "model": {"base": config.model.base, "revision": config.model.revision, **outcome.loaded.as_dict()},
        "layout": outcome.layout,
        "blocks_per_update": training.planned_blocks,
        "divisions": [asdict(d) for d in outcome.divisions],
        "loss": outcome.loss_path,
        "optimizer": {
            "name": "AdamW",
            "betas": list(training.adam_betas),
            "epsilon": training.adam_epsilon,
            "weight_decay": training.weight_decay,
            "clip": training.clip,
        },
        "schedule": asdict(outcome.schedule),
        "lora": config.model.lora.model_dump(mode="json")
        if config.model.parameterization != "full"
        else None,
        "seed": training.seed,
        "updates": {"planned": outcome.planned, "done": outcome.done},
        "examples": consumed.examples,
        "tokens": consumed.tokens,
        "supervised_tokens": consumed.supervised,
        "per_update": per_update(outcome.watch.curves),
        "stopped": outcome.stopped,
        "best": {"step": best[0], "val_loss": best[1]} if best else None,
        "checkpoints": checkpoints,
        "diagnosis": [asdict(f) for f in findings],
    }


def per_update(curves: Any) -> dict[str, dict[str, float]]:
    """What the updates held, as they were made: the table that `sft check` shows before the run."""
    return {
        name: spread([value for _, value in curves.get(name)])
        for name in ("examples", "tokens", "supervised_tokens")
    }


def _plots(out: Path, curves: Any) -> None:
    folder = out / "plots"
    plots.plot_loss(folder / "loss.png", curves.get("loss"), curves.get("val_loss"))
    plots.plot_curve(folder / "learning_rate.png", curves.get("learning_rate"), "Learning rate", "")
    plots.plot_curve(folder / "grad_norm.png", curves.get("grad_norm"), "Gradient norm before clipping", "")


def _members(feed: Any, fingerprint: str, step: int) -> Members:
    blocks = [int(b) for b in feed.plan.blocks(step - 1)]
    return Members(blocks, feed.row_ids(step - 1), f"sft replay {fingerprint[:12]} --update {step}")


def _finite(outcome: Any, members: Callable[[int], Members]) -> Check:
    if outcome.failure is None:
        return Check("finite_loss", True, f"All {outcome.done} updates had a finite loss and gradient.")
    step = outcome.failure.step
    of = members(step)
    applied = "the weights are spoiled" if outcome.failure.applied else "it was not applied"
    return Check(
        "finite_loss",
        False,
        f"{outcome.failure}: {applied}, and the run stopped. Lower training.learning_rate or training.clip, or mend the rows of this update: {of.words}",
        {"update": number(step), "rows": table([{"row_id": r} for r in of.row_ids[:20]])},
    )


def _resumable(out: Path) -> Check:
    bad, good = [], 0
    for folder in checkpoint_folders(out):
        try:
            read_bundle(folder)
            good += 1
        except NotResumable as why:
            bad.append({"checkpoint": folder.name, "why": str(why)})
    if bad:
        return Check(
            "checkpoints_resumable",
            False,
            f"{len(bad)} of {good + len(bad)} checkpoints cannot be resumed: {bad[0]['why']}",
            {"checkpoints": table(bad)},
        )
    if not good:
        return Check(
            "checkpoints_resumable",
            False,
            "The run ended before the first checkpoint: set training.save_steps lower",
        )
    return Check(
        "checkpoints_resumable", True, f"{good} checkpoints, each with the eleven items, hashes verified."
    )


def _as_planned(consumed: Budget, planned: Budget, outcome: Any) -> Check:
    rows = [
        {"what": name, "planned": getattr(planned, name), "consumed": getattr(consumed, name)}
        for name in ("updates", "examples", "tokens", "supervised")
    ]
    wrong = [r for r in rows if r["planned"] != r["consumed"]]
    short = (
        outcome.done < outcome.planned
        and outcome.failure is None
        and not outcome.stopped.startswith("early stopping")
    )
    evidence = {"budget": table(rows)}
    if wrong:
        return Check(
            "budget_as_planned",
            False,
            "; ".join(f"{r['what']}: {r['consumed']:,} consumed, {r['planned']:,} planned" for r in wrong),
            evidence,
        )
    if short:
        return Check(
            "budget_as_planned",
            False,
            f"{outcome.done} of {outcome.planned} updates were made, and nothing says why",
            evidence,
        )
    return Check(
        "budget_as_planned",
        True,
        f"{consumed.updates:,} updates, {consumed.examples:,} examples, {consumed.supervised:,} supervised tokens, as planned ({outcome.stopped}).",
        evidence,
    )


def _diagnosis(findings: list[Finding]) -> Check:
    if not findings:
        return Check("diagnosis", True, "Nothing looks wrong in the curves.")
    rows = [{"kind": f.kind, "update": f.step, "what": f.words, "replay": f.replay} for f in findings]
    return Check(
        "diagnosis",
        False,
        findings[0].words + (f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""),
        {"findings": table(rows)},
    )


def _evidence(outcome: Any, consumed: Budget, checkpoints: list[dict[str, Any]]) -> dict[str, Evidence]:
    curves, speed = outcome.watch.curves, outcome.watch.speed
    seconds = sum(s["seconds"] for s in speed)
    loss, val = curves.get("loss"), curves.get("val_loss")
    found: dict[str, Evidence] = {
        "loss_curve": plot("plots/loss.png"),
        "learning_rate_curve": plot("plots/learning_rate.png"),
        "grad_norm_curve": plot("plots/grad_norm.png"),
        "budget": table(
            [{"per update": name.replace("_", " "), **found} for name, found in per_update(curves).items()]
        ),
        "updates": number(consumed.updates),
        "supervised_tokens": number(consumed.supervised),
        "trainable_parameters": number(outcome.loaded.trainable_parameters),
        "training_seconds": number(round(seconds, 1)),
        "setup": markdown(
            f"{outcome.loaded.architecture}, {outcome.loaded.parameterization}, {outcome.loaded.precision} on {outcome.loaded.device}, attention {outcome.loaded.attention}, "
            f"layout {outcome.layout}, loss {outcome.loss_path}, {outcome.threads} threads; ended: {outcome.stopped}"
            + (f"; resumed after update {outcome.resumed_at}" if outcome.resumed_at else "")
            + "".join(f"; from update {d.from_update} on {d.words}" for d in outcome.divisions)
        ),
    }
    if checkpoints:
        found["checkpoints"] = table(checkpoints)
    if loss:
        found["train_loss"] = number(round(loss[-1][1], 6))
    if val:
        found["val_loss"] = number(round(val[-1][1], 6))
    if seconds:
        found["supervised_tokens_per_second"] = number(round(consumed.supervised / seconds, 1))
        found["tokens_per_second"] = number(round(consumed.tokens / seconds, 1))
    mfu = [s["mfu"] for s in speed if "mfu" in s]
    if mfu:
        found["mfu"] = number(round(sum(mfu) / len(mfu), 4))
    if outcome.samples:
        found["samples"] = table([{k: str(v)[:600] for k, v in row.items()} for row in outcome.samples])
    return found

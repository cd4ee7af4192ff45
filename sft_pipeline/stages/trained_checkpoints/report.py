"""What people see of a training: plots, and the evidence of the materialization."""

from pathlib import Path
from typing import Any

from sft_pipeline.plots.training import plot_curve, plot_loss
from sft_pipeline.stages.stage import Evidence, markdown, number, plot, table
from sft_pipeline.stages.trained_checkpoints.train import TrainingOutcome
from sft_pipeline.training.progress import Curves


def write_plots(out: Path, curves: Curves) -> None:
    """plots/*.png of the artifact."""
    folder = out / "plots"
    plot_loss(folder / "loss.png", curves.get("loss"), curves.get("val_loss"))
    plot_curve(folder / "learning_rate.png", curves.get("learning_rate"), "Learning rate", "")
    plot_curve(folder / "grad_norm.png", curves.get("grad_norm"), "Gradient norm before clipping", "")


def evidence(
    outcome: TrainingOutcome, checkpoints: list[dict[str, Any]], per_update: dict[str, dict[str, float]]
) -> dict[str, Evidence]:
    """Numbers, tables and plots for the Dagster UI and MLflow."""
    curves, speed, loaded = outcome.watch.curves, outcome.watch.speed, outcome.loaded
    seconds, supervised = sum(s["seconds"] for s in speed), curves.total("supervised_tokens")
    found: dict[str, Evidence] = {
        "loss_curve": plot("plots/loss.png"),
        "learning_rate_curve": plot("plots/learning_rate.png"),
        "grad_norm_curve": plot("plots/grad_norm.png"),
        "budget": table([{"per update": n.replace("_", " "), **values} for n, values in per_update.items()]),
        "updates": number(outcome.done),
        "supervised_tokens": number(supervised),
        "trainable_parameters": number(loaded.trainable_parameters),
        "training_seconds": number(round(seconds, 1)),
        "setup": markdown(
            f"{loaded.architecture}, {loaded.parameterization}, {loaded.precision} on {loaded.device}, "
            f"attention {loaded.attention}, layout {outcome.layout}, loss {outcome.loss_path}, "
            f"{outcome.threads} threads; ended: {outcome.stopped}"
            + (f"; resumed after update {outcome.resumed_at}" if outcome.resumed_at else "")
            + "".join(f"; from update {b.from_update} on {b.words}" for b in outcome.batch_layouts)
        ),
    }
    if checkpoints:
        found["checkpoints"] = table(checkpoints)
    for name, curve in (("train_loss", curves.get("loss")), ("val_loss", curves.get("val_loss"))):
        if curve:
            found[name] = number(round(curve[-1][1], 6))
    if seconds:
        found["supervised_tokens_per_second"] = number(round(supervised / seconds, 1))
        found["tokens_per_second"] = number(round(curves.total("tokens") / seconds, 1))
    mfu = [s["mfu"] for s in speed if "mfu" in s]
    if mfu:
        found["mfu"] = number(round(sum(mfu) / len(mfu), 4))
    if outcome.samples:
        found["samples"] = table([{k: str(v)[:600] for k, v in row.items()} for row in outcome.samples])
    return found

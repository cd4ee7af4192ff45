"""Plots of an evaluation, as PNG: scores over the checkpoints, and base against tuned."""

from collections.abc import Sequence
from pathlib import Path

from sft_pipeline.plots.canvas import blank, save
from sft_pipeline.stages.evaluation.compare import PairedComparison
from sft_pipeline.stages.evaluation.select import Selection

BASE, TUNED = "#9aa5b1", "#2f6fb3"


def plot_comparison(path: Path, comparisons: Sequence[PairedComparison]) -> None:
    """Bars of base and tuned with their intervals, the losses in a panel of their own."""
    scores = [c for c in comparisons if not c.lower_is_better]
    losses = [c for c in comparisons if c.lower_is_better]
    panels = [panel for panel in (scores, losses) if panel]
    figure = blank(1.5 + 1.7 * max(len(comparisons), 2), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[len(p) for p in panels])[0]
    for axis, panel in zip(axes, panels):
        for offset, which, colour in ((-0.2, "base", BASE), (0.2, "tuned", TUNED)):
            intervals = [c.base if which == "base" else c.tuned for c in panel]
            axis.bar(
                [x + offset for x in range(len(panel))],
                [i.value for i in intervals],
                0.4,
                yerr=[
                    [max(0.0, i.value - i.low) for i in intervals],
                    [max(0.0, i.high - i.value) for i in intervals],
                ],
                capsize=3,
                color=colour,
                label=which,
            )
        axis.set_xticks(range(len(panel)), [c.name for c in panel], rotation=15, ha="right", fontsize=8)
        if panel is losses:
            axis.set_title("nats per token, lower is better", fontsize=8)
        else:
            axis.set_title("higher is better", fontsize=8)
            # A Python grader may give any number: a rating from 1 to 5, a penalty below 0.
            intervals = [i for c in panel for i in (c.base, c.tuned)]
            lowest, highest = min(i.low for i in intervals), max(i.high for i in intervals)
            axis.set_ylim(min(0.0, 1.1 * lowest), max(1.05, 1.1 * highest))
    axes[0].legend(fontsize=8)
    save(figure, path)


def plot_checkpoints(path: Path, selection: Selection) -> None:
    """Validation scores (left axis) and loss (right axis) over the steps; the chosen step is marked."""
    figure = blank(6, 3.6)
    axis = figure.subplots()
    rows = selection.table
    steps = [r["step"] for r in rows]
    for name in rows[0]:
        if name not in ("step", "gates", "rank", "val_loss"):
            axis.plot(steps, [r[name] for r in rows], marker="o", markersize=3, label=name)
    right = axis.twinx()
    losses = [r["val_loss"] for r in rows]
    right.plot(steps, losses, color="#888888", linestyle="--", marker=".", label="val_loss")
    axis.axvline(selection.step, color=TUNED, alpha=0.3, linewidth=6)
    axis.set_xlabel("step (the chosen one is shaded)")
    axis.set_ylabel("score")
    right.set_ylabel("val_loss, nats per token")
    handles, labels = axis.get_legend_handles_labels()
    loss_handles, loss_labels = right.get_legend_handles_labels()
    figure.legend(
        handles + loss_handles, labels + loss_labels, fontsize=8, loc="outside lower center", ncols=3
    )
    save(figure, path)

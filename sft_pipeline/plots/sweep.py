"""Two plots of a sweep: every loss curve over the tokens spent, and the measures over what varies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_pipeline.plots.canvas import axes, save
from sft_pipeline.sweep.grid import as_text
from sft_pipeline.sweep.ranking import JUDGED, Rank
from sft_pipeline.sweep.trial import TrialResult

LOG_FROM = 10  # values that span more than this are drawn on a logarithmic axis
LOSS_COLOUR = "#c8452e"


def plot_curves(path: Path, results: Sequence[TrialResult]) -> None:
    """Training loss (lines) and validation loss (dots) of each trial, on a logarithmic axis."""
    figure, axis = axes(8, 4.2)
    drawn = [r for r in results if r.loss]
    for result in drawn:
        (line,) = axis.plot(*zip(*result.loss), linewidth=1.2, alpha=0.8, label=result.trial.label)
        if result.val_loss:
            axis.plot(*zip(*result.val_loss), color=line.get_color(), linestyle="", marker="o", markersize=5)
    if drawn:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        # A trial that diverges must not flatten the others.
        axis.set_ylim(top=1.5 * max(r.loss[0][1] for r in drawn))
        axis.legend(frameon=False, fontsize=8)
    axis.set(
        xlabel="supervised tokens trained on",
        ylabel="nats per supervised token",
        title="Training loss (lines) and validation loss (dots)",
    )
    axis.grid(alpha=0.25, which="both")
    save(figure, path)


def plot_ranking(path: Path, ranked: Sequence[tuple[TrialResult, Rank]], rank_by: Sequence[str]) -> None:
    """The ranking's own measures over the value that varies, or over the trials in rank order if several do.

    Scores have the left axis, val_loss the right one; the best trial is shaded, and those that fail the gates
    are hollow.
    """
    judged = [(r, rank) for r, rank in ranked if r.end.status == JUDGED]
    best = judged[0][0]
    positions, labels, logarithmic = _positions([r for r, _ in judged])
    figure, axis = axes(8, 4.2)
    ranking = [term.lstrip("-") for term in rank_by]
    graders = [n for n in ranking if n != "val_loss"] or [n for n in best.end.scores if n != "val_loss"]
    for name in graders:
        _draw(axis, positions, judged, name, None)
    losses = axis.twinx() if graders else axis
    _draw(losses, positions, judged, "val_loss", LOSS_COLOUR)
    losses.set_ylabel("val_loss, nats per supervised token", color=LOSS_COLOUR)
    if graders:
        axis.set_ylabel("score")
        axis.update_datalim([(positions[best.trial.number], 0.0)])  # scores are read against zero
        axis.autoscale_view()
    if logarithmic:
        axis.set_xscale("log")
    axis.axvline(positions[best.trial.number], color="#2f6fb3", alpha=0.25, linewidth=8)
    axis.set_xticks(
        [positions[r.trial.number] for r, _ in judged],
        [labels[r.trial.number] for r, _ in judged],
        fontsize=8,
    )
    axis.minorticks_off()
    axis.set_xlabel(", ".join(best.trial.values))
    handles = [h for a in dict.fromkeys((axis, losses)) for h in a.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3)
    axis.set_title("The best is shaded; hollow dots fail the gates", fontsize=9)
    save(figure, path)


def _draw(
    axis: Any,
    positions: dict[int, float],
    judged: Sequence[tuple[TrialResult, Rank]],
    name: str,
    colour: str | None,
) -> None:
    points = sorted(
        (positions[r.trial.number], value, bool(rank.gates_passed))
        for r, rank in judged
        if (value := r.end.scores.get(name)) is not None
    )
    (line,) = axis.plot(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        color=colour,
        linestyle="--" if name == "val_loss" else "-",
        linewidth=1.4,
        label=name,
    )
    for x, y, passed in points:
        axis.plot(
            x, y, marker="o", markersize=6, color=line.get_color(), fillstyle="full" if passed else "none"
        )


def _positions(results: Sequence[TrialResult]) -> tuple[dict[int, float], dict[int, str], bool]:
    """(x and label of each trial, whether the axis is logarithmic); x is the value if one number varies."""
    values = {r.trial.number: list(r.trial.values.values()) for r in results}
    labels = {number: "\n".join(map(as_text, v)) for number, v in values.items()}
    single = [v[0] for v in values.values() if len(v) == 1]
    if len(single) < len(values) or not all(type(v) in (int, float) for v in single):
        return {number: float(i) for i, number in enumerate(values)}, labels, False
    key = next(iter(results[0].trial.values))
    wide = min(single) > 0 and (max(single) >= LOG_FROM * min(single) or key.endswith("learning_rate"))
    return {number: float(v[0]) for number, v in values.items()}, labels, wide

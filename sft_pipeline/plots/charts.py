"""The few plots that data stages make, as PNG files without any global matplotlib state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sft_pipeline.plots.canvas import decades, quick_axes, save

SIZE = (6.4, 3.2)  # inches
COLOURS = ("#3b6ea8", "#d98b2b", "#4d9a6a", "#a05195", "#777777")


def histogram(path: Path, series: Mapping[str, np.ndarray], *, title: str, x: str, log: bool = True) -> None:
    """Draws the distributions of `series` (label -> non-negative numbers) over shared bins.

    Args:
        log: Logarithmic bins. Several series are drawn as shares, so that sides of unlike size compare.
    """
    figure, axes = quick_axes(*SIZE)
    values = np.concatenate([np.asarray(v, dtype=float) for v in series.values()] or [np.zeros(0)])
    if len(values):
        top = max(values.max(), 1.0)
        bins = np.geomspace(1, top + 1, 40) if log else np.linspace(0, top + 1, 40)
        for (label, numbers), colour in zip(series.items(), COLOURS):
            weights = np.full(len(numbers), 1 / len(numbers)) if len(series) > 1 and len(numbers) else None
            axes.hist(
                np.maximum(numbers, 1) if log else numbers,
                bins=bins,
                weights=weights,
                label=f"{label} ({len(numbers):,})",
                histtype="stepfilled",
                alpha=0.45,
                color=colour,
            )
        if log:
            axes.set_xscale("log")
            decades(axes.xaxis, 1, top + 1)
        axes.legend(frameon=False, fontsize=8)
    axes.set(title=title, xlabel=x, ylabel="share of rows" if len(series) > 1 else "rows")
    save(figure, path)


def bars(
    path: Path, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, title: str, y: str
) -> None:
    """Draws, for each of `groups`, one bar per series with its number on top."""
    figure, axes = quick_axes(*SIZE)
    width = 0.8 / max(1, len(series))
    for i, ((label, numbers), colour) in enumerate(zip(series.items(), COLOURS)):
        drawn = axes.bar(np.arange(len(groups)) + i * width, numbers, width, label=label, color=colour)
        axes.bar_label(drawn, labels=[f"{n:,.0f}" for n in numbers], fontsize=8)
    axes.set_xticks(np.arange(len(groups)) + width * (len(series) - 1) / 2, groups)
    axes.set(title=title, ylabel=y)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)

"""The plots of the data stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sft_pipeline.plots.canvas import decades, quick_axes, save

SIZE = (6.4, 3.2)  # inches
COLOURS = ("#3b6ea8", "#d98b2b", "#4d9a6a", "#a05195", "#777777")


def plot_histogram(
    path: Path, series: Mapping[str, np.ndarray], *, title: str, x: str, log: bool = True
) -> None:
    """Plots the distributions of `series` (label -> non-negative numbers) over shared bins.

    Args:
        log: Logarithmic bins. Several series are drawn as shares, so that splits of unlike size compare.
    """
    figure, axes = quick_axes(*SIZE)
    values = np.concatenate([np.asarray(v, dtype=float) for v in series.values()] or [np.zeros(0)])
    if len(values):
        top = max(values.max(), 1.0)
        bins = np.geomspace(1, top + 1, 40) if log else np.linspace(0, top + 1, 40)
        for (label, numbers), colour in zip(series.items(), COLOURS):
            axes.hist(
                np.maximum(numbers, 1) if log else numbers,
                bins=bins,
                weights=_shares(numbers) if len(series) > 1 else None,
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


def plot_bars(
    path: Path, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, title: str, y: str
) -> None:
    """Plots, for each of `groups`, one bar per series with its number on top."""
    figure, axes = quick_axes(*SIZE)
    width = 0.8 / max(1, len(series))
    for i, ((label, numbers), colour) in enumerate(zip(series.items(), COLOURS)):
        drawn = axes.bar(np.arange(len(groups)) + i * width, numbers, width, label=label, color=colour)
        axes.bar_label(drawn, labels=[f"{n:,.0f}" for n in numbers], fontsize=8)
    axes.set_xticks(np.arange(len(groups)) + width * (len(series) - 1) / 2, groups)
    axes.set(title=title, ylabel=y)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def plot_block_fill(path: Path, fills: npt.NDArray, lengths: npt.NDArray, max_length: int) -> None:
    """Plots how full blocks are, beside how full they would be with one example each.

    Args:
        fills: Tokens per block.
        lengths: Tokens per example.
    """
    figure, axes = quick_axes(*SIZE)
    for label, tokens, colour in (
        ("one example per block", lengths, "#cfd8dc"),
        ("packed", fills, "#52b788"),
    ):
        bins = np.linspace(0, 1, 41).tolist()
        axes.hist(tokens / max_length, bins=bins, weights=_shares(tokens), color=colour, label=label)
    axes.set(xlabel="fill of a block", ylabel="share of blocks")
    axes.legend(frameon=False)
    save(figure, path)


def plot_updates(path: Path, supervised: npt.NDArray) -> None:
    """Plots the supervised tokens per update, in the order of training."""
    figure, axes = quick_axes(*SIZE)
    marker = "." if len(supervised) < 100 else None
    axes.plot(1 + np.arange(len(supervised)), supervised, color="#2d6a4f", linewidth=1, marker=marker)
    axes.set_ylim(0, float(supervised.max()) * 1.15 if len(supervised) else 1)
    axes.set(xlabel="update", ylabel="supervised tokens")
    save(figure, path)


def _shares(values: npt.NDArray) -> npt.NDArray:
    """Weights that sum to 1."""
    return np.full(len(values), 1 / max(len(values), 1))

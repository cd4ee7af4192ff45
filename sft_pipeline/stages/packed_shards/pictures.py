"""Plots of the packing and of the plan."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sft_pipeline.plots.canvas import quick_axes, save


def plot_fill(path: Path, fills: npt.NDArray, lengths: npt.NDArray, max_length: int) -> None:
    """How full blocks are, beside how full they would be with one example each."""
    fig, ax = quick_axes(7, 3.2)
    bins = np.linspace(0, 1, 41).tolist()
    ax.hist(
        lengths / max_length,
        bins=bins,
        weights=np.full(len(lengths), 1 / max(len(lengths), 1)),
        color="#cfd8dc",
        label="one example per block",
    )
    ax.hist(
        fills / max_length,
        bins=bins,
        weights=np.full(len(fills), 1 / max(len(fills), 1)),
        color="#52b788",
        label="packed",
    )
    ax.set_xlabel("fill of a block")
    ax.set_ylabel("share of blocks")
    ax.legend(frameon=False)
    save(fig, path)


def plot_updates(path: Path, supervised: npt.NDArray) -> None:
    """Supervised tokens per update, in the order of training."""
    fig, ax = quick_axes(7, 3.2)
    ax.plot(
        np.arange(len(supervised)),
        supervised,
        color="#2d6a4f",
        linewidth=1,
        marker="." if len(supervised) < 100 else None,
    )
    ax.set_ylim(0, float(supervised.max()) * 1.15 if len(supervised) else 1)
    ax.set_xlabel("update")
    ax.set_ylabel("supervised tokens")
    save(fig, path)

"""Plots of a training, as PNG."""

from pathlib import Path
from typing import Any

from sft_pipeline.plots.canvas import axes, save

Curve = list[tuple[int, float]]


def plot_loss(path: Path, loss: Curve, val_loss: Curve, title: str = "Loss per supervised token") -> None:
    """Training and validation loss over updates, in nats per supervised token."""
    figure, ax = _axes("update", "nats", title)
    if loss:
        ax.plot(*zip(*loss), color="#9ec1e6", linewidth=1, label="training, per update")
        ax.plot(*zip(*_smooth(loss)), color="#1f5fa8", linewidth=1.8, label="training, smoothed")
    if val_loss:
        ax.plot(*zip(*val_loss), color="#c8452e", marker="o", markersize=4, label="validation")
    if loss or val_loss:
        ax.legend(frameon=False)
    save(figure, path)


def plot_curve(path: Path, curve: Curve, title: str, unit: str) -> None:
    """One value over updates."""
    figure, ax = _axes("update", unit, title)
    if curve:
        ax.plot(*zip(*curve), color="#1f5fa8", linewidth=1.4)
    save(figure, path)


def _smooth(curve: Curve) -> Curve:
    """Exponential mean over about a twentieth of the run."""
    weight = min(0.95, max(0.5, 1 - 20 / max(1, len(curve))))
    out, value, norm = [], 0.0, 0.0
    for step, x in curve:
        value, norm = weight * value + (1 - weight) * x, weight * norm + (1 - weight)
        out.append((step, value / norm))
    return out


def _axes(x: str, y: str, title: str) -> tuple[Any, Any]:
    figure, found = axes(7, 3.6)
    found.set(xlabel=x, ylabel=y, title=title)
    found.grid(alpha=0.25)
    return figure, found

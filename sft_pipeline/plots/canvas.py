"""Matplotlib without a display or global state, imported only when something is drawn."""

from pathlib import Path
from typing import Any

DPI = 110


def blank(width: float, height: float, *, laid_out: bool = True) -> Any:
    """An empty figure; inches. A constrained layout costs as much as the drawing itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained" if laid_out else None)
    FigureCanvasAgg(figure)
    return figure


def axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes; inches."""
    figure = blank(width, height)
    return figure, _without_a_frame(figure.add_subplot())


def quick_axes(width: float, height: float) -> tuple[Any, Any]:
    """The same in half the time: fixed margins, for a title and labels of seven characters."""
    figure = blank(width, height, laid_out=False)
    place = (0.95 / width, 0.6 / height, 1 - 1.15 / width, 1 - 0.95 / height)
    return figure, _without_a_frame(figure.add_axes(place))


def _without_a_frame(found: Any) -> Any:
    found.spines[["top", "right"]].set_visible(False)
    return found


def decades(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis at powers of ten, written out. Minor ticks cost most of the drawing."""
    from math import ceil, floor, log10

    ticks = [10.0**e for e in range(ceil(log10(low)), floor(log10(high)) + 1)]
    axis.set_ticks(ticks, [f"{t:,.0f}" if t >= 1 else f"{t:g}" for t in ticks])
    axis.set_ticks([], minor=True)


def save(figure: Any, path: Path) -> None:
    """Writes the figure as a PNG; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

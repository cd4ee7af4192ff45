"""Matplotlib without a display or global state, imported only when something is drawn."""

from pathlib import Path
from typing import Any

DPI = 110


def blank(width: float, height: float, *, laid_out: bool = True) -> Any:
    """An empty figure; inches. Laying out its parts costs as much as drawing it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained" if laid_out else None)
    FigureCanvasAgg(figure)
    return figure


def axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure with one pair of axes; inches."""
    figure = blank(width, height)
    found = figure.add_subplot()
    found.spines[["top", "right"]].set_visible(False)
    return figure, found


def save(figure: Any, path: Path) -> None:
    """Writes the figure as a PNG; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)

"""A number per update, summarized: the same in a plan's budget and in the record of a training."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Spread:
    """`cv`: standard deviation over mean."""

    mean: float
    min: float
    max: float
    cv: float


def spread(values: npt.ArrayLike) -> Spread:
    """Summarizes numbers; of none, everything is 0. Least and greatest of whole numbers stay whole."""
    values = np.asarray(values)
    whole = values.dtype.kind != "f"
    if not len(values):
        return Spread(0.0, 0, 0, 0.0)
    mean = float(np.mean(values))
    return Spread(
        round(mean, 2) if whole else float(f"{mean:.6g}"),
        int(np.min(values)) if whole else float(f"{np.min(values):.6g}"),
        int(np.max(values)) if whole else float(f"{np.max(values):.6g}"),
        round(float(np.std(values)) / mean, 5) if mean else 0.0,
    )

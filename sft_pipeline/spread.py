"""A number per update, summarized: the same in a plan's budget and in the record of a training."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Spread:
    """`cv`: standard deviation over mean."""

    mean: float
    min: int
    max: int
    cv: float


def spread(values: npt.ArrayLike) -> Spread:
    """Summarizes whole numbers; of none, everything is 0."""
    values = np.asarray(values)
    if not len(values):
        return Spread(0.0, 0, 0, 0.0)
    mean = float(np.mean(values))
    return Spread(
        round(mean, 2),
        int(np.min(values)),
        int(np.max(values)),
        round(float(np.std(values)) / mean, 5) if mean else 0.0,
    )

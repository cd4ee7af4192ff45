"""Base and tuned on the same rows: means, their difference, confidence intervals and an exact paired test.

Rows of one group are not independent, so the bootstrap draws whole groups with replacement (a cluster
bootstrap; Cameron, Gelbach and Miller 2008), both models by the same draw. The paired test is the exact
two-sided sign test on the rows where the two differ; for pass/fail scores this is McNemar's exact test.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
_CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class ConfidenceInterval:
    """A value with its 95 % confidence interval (percentiles of the bootstrap); all NaN without rows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """One measure of both models on the same rows.

    Attributes:
        base, tuned: Mean over the rows; for a loss, the sum over the tokens divided by their number.
        difference: tuned - base.
        p_value: Two-sided exact sign test on wins and losses, by row.
        wins, losses, ties: Rows on which the tuned model is better, worse, equal.
    """

    name: str
    lower_is_better: bool
    rows: int
    groups: int
    base: ConfidenceInterval
    tuned: ConfidenceInterval
    difference: ConfidenceInterval
    p_value: float
    wins: int
    losses: int
    ties: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN becomes null."""
        return _without_nan(asdict(self))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    name: str,
    base: npt.ArrayLike,
    tuned: npt.ArrayLike,
    groups: Sequence[str],
    *,
    weights: npt.ArrayLike | None = None,
    lower_is_better: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedComparison:
    """Compares two models, paired by row.

    Args:
        base, tuned: One score per row; with `weights`, one sum per row (for example of token losses).
        groups: The group of each row.
        weights: What each sum is divided by (for example tokens); None: 1 per row.
        seed: Of the bootstrap.
    """
    a, b = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    w = np.ones(len(a)) if weights is None else np.asarray(weights, dtype=np.float64)
    names, member = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    n_groups = len(names)
    if len(a) == 0 or w.sum() == 0:
        nothing = ConfidenceInterval(math.nan, math.nan, math.nan)
        return PairedComparison(
            name, lower_is_better, len(a), n_groups, nothing, nothing, nothing, math.nan, 0, 0, 0
        )
    per_group = np.stack(
        [np.bincount(member, weights=x, minlength=n_groups) for x in (a, b, w)]
    )  # (3, groups)
    drawn = _resampled(per_group, seed, resamples)  # (3, resamples)
    kept = drawn[2] > 0
    mean_a, mean_b = drawn[0][kept] / drawn[2][kept], drawn[1][kept] / drawn[2][kept]
    whole = [math.fsum(x) / math.fsum(w) for x in (a, b)]
    intervals = [
        _widened(_interval(value, resampled), x, n_groups)
        for value, resampled, x in ((whole[0], mean_a, a), (whole[1], mean_b, b))
    ]
    row_a, row_b = (x / np.where(w > 0, w, 1) for x in (a, b))
    higher, lower = int((row_b > row_a).sum()), int((row_b < row_a).sum())
    wins, losses = (lower, higher) if lower_is_better else (higher, lower)
    return PairedComparison(
        name=name,
        lower_is_better=lower_is_better,
        rows=len(a),
        groups=n_groups,
        base=intervals[0],
        tuned=intervals[1],
        difference=_difference(intervals[0], intervals[1], mean_b - mean_a),
        p_value=sign_test(wins, losses),
        wins=wins,
        losses=losses,
        ties=len(a) - wins - losses,
    )


def _resampled(per_group: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums over groups drawn with replacement: (measures, groups) -> (measures, resamples)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    n = per_group.shape[1]
    at_once = max(1, _CELLS_AT_ONCE // n)
    sums = []
    for start in range(0, resamples, at_once):
        draw = rng.integers(0, n, size=(min(at_once, resamples - start), n))
        sums.append(per_group[:, draw].sum(axis=2))
    return np.concatenate(sums, axis=1)


def _interval(value: float, drawn: np.ndarray) -> ConfidenceInterval:
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)
    return ConfidenceInterval(float(value), float(low), float(high))


def _widened(found: ConfidenceInterval, scores: np.ndarray, groups: int) -> ConfidenceInterval:
    """Where every row passes, or every row fails, a bootstrap sees no uncertainty at all: the exact binomial
    interval (Clopper and Pearson 1934) with the groups as trials takes its place."""
    slack = 1 - 0.025 ** (1 / groups)
    if (scores == 1).all():
        return ConfidenceInterval(found.value, 1 - slack, 1.0)
    if (scores == 0).all():
        return ConfidenceInterval(found.value, 0.0, slack)
    return found


def _difference(base: ConfidenceInterval, tuned: ConfidenceInterval, drawn: np.ndarray) -> ConfidenceInterval:
    """The bootstrap's interval; without width, the two models' own combined (Newcombe 1998)."""
    found = _interval(tuned.value - base.value, drawn)
    if found.low != found.high or math.isnan(found.low):
        return found
    below = math.hypot(tuned.value - tuned.low, base.high - base.value)
    above = math.hypot(tuned.high - tuned.value, base.value - base.low)
    return ConfidenceInterval(found.value, found.value - below, found.value + above)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of `wins` against `losses` under even odds; 1.0 where nothing differs."""
    n, k = wins + losses, min(wins, losses)
    if n == 0 or 2 * k == n:
        return 1.0
    half = math.lgamma(n + 1) - n * math.log(2)
    tail = math.fsum(math.exp(half - math.lgamma(i + 1) - math.lgamma(n - i + 1)) for i in range(k + 1))
    return min(1.0, 2 * tail)

"""Which rows of a source are taken: `limit` and `weight`.

Rows are ranked by a hash of (seed, row_id), so that a row's chance does not depend on where it lies, and a row that was
sampled stays sampled when others come or go around it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

SEED = b"sft-sample-v1"


def rank(row_id: str) -> int:
    """A pseudo-random number below 2**64 that depends on the row's content only."""
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8, key=SEED).digest(), "big")


def sizes(rows: Sequence[int], limits: Sequence[int | None], weights: Sequence[float]) -> list[int]:
    """How many rows of each source are taken.

    First the limits. Then, where weights differ, as many rows as possible such that the shares are proportional to
    the weights (rounded down, at least one) and none is taken twice. Sources without rows do not count.
    """
    room = [n if limit is None else min(n, limit) for n, limit in zip(rows, limits)]
    if len(set(weights)) == 1:
        return room
    scale = min((n / w for n, w in zip(room, weights) if n), default=0.0)
    # The source that limits the mixture must come out whole in spite of rounding.
    return [min(n, max(1, int(scale * w + 1e-9))) if n else 0 for n, w in zip(room, weights)]


def chosen(ranks: np.ndarray, count: int) -> np.ndarray:
    """The `count` smallest of `ranks` (uint64), ties by position: a mask in the order of the rows."""
    mask = np.zeros(len(ranks), dtype=bool)
    if count >= len(ranks):
        mask[:] = True
    elif count:
        mask[np.argsort(ranks, kind="stable")[:count]] = True
    return mask

"""What the plan says a run consumes, and what it consumed."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Budget:
    """Sums over updates; supervised: tokens that carry loss."""

    updates: int
    examples: int
    tokens: int
    supervised: int


def planned_budget(feed: Any, updates: int) -> Budget:
    """What the plan says the first `updates` updates hold; where it does not say, its blocks are counted.

    Either way apart from the code that lays blocks out for the model.
    """
    said = [feed.plan.planned(name, updates) for name in ("examples", "tokens", "supervised")]
    if None not in said:
        return Budget(updates, *said)
    times: dict[int, int] = {}
    for update in range(updates):
        for block in feed.plan.blocks(update):
            times[int(block)] = times.get(int(block), 0) + 1
    examples = tokens = supervised = 0
    for number in sorted(times):
        block = feed.shards.block(number)
        examples += times[number] * len(block.lengths)
        tokens += times[number] * len(block.input_ids)
        supervised += times[number] * int(
            np.count_nonzero((block.labels != -100) & (block.position_ids != 0))
        )
    return Budget(updates, examples, tokens, supervised)


def spread(values: Sequence[float]) -> dict[str, float]:
    """A count per update, summarised as in the budget before the run. `cv`: standard deviation over mean."""
    if not values:
        return {"mean": 0.0, "min": 0, "max": 0, "cv": 0.0}
    mean = fmean(values)
    return {
        "mean": round(mean, 2),
        "min": int(min(values)),
        "max": int(max(values)),
        "cv": round(pstdev(values) / mean, 5) if mean else 0.0,
    }

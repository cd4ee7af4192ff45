"""The arithmetic of batches: what an update holds before a GPU is touched. Pure numbers, light imports.

Not all "global batches" of equal size are equal: 3 x 12 x 2 and 6 x 6 x 2 are both 72 examples per update, but with
5,200 and 4,300 supervised tokens per rank they average 10,400 and 8,600 supervised tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from sft_pipeline.stages.packed_shards.packing import Packing, pack
from sft_pipeline.stages.packed_shards.plan import UpdatePlan, plan_updates


def examples_per_update(per_device_batch: int, gradient_accumulation: int, processes: int) -> int:
    """Examples (with packing: blocks) behind one optimizer update."""
    return per_device_batch * gradient_accumulation * processes


def supervised_tokens_per_update(microbatches: Sequence[int], processes: int) -> int:
    """Supervised tokens behind one update: those of each accumulated microbatch of a rank, times equal ranks."""
    return sum(microbatches) * processes


def ratio(first: tuple[int, int, int], second: tuple[int, int, int]) -> float:
    """How many times the second setting's (per device, accumulation, processes) update holds the first's."""
    return examples_per_update(*second) / examples_per_update(*first)


def padding_waste(lengths: Sequence[int] | npt.NDArray, max_length: int) -> float:
    """Share of positions that are padding where every example is padded to `max_length`."""
    return 1 - float(np.sum(lengths)) / (len(lengths) * max_length) if len(lengths) else 0.0


def packing_efficiency(tokens: int, blocks: int, max_length: int) -> float:
    """Share of the blocks' positions that hold tokens."""
    return tokens / (blocks * max_length) if blocks else 0.0


@dataclass(frozen=True)
class Spread:
    """A number per update, summarised. `cv`: standard deviation over mean."""

    mean: float
    min: int
    max: int
    cv: float


def spread(values: npt.NDArray) -> Spread:
    if not len(values):
        return Spread(0.0, 0, 0, 0.0)
    mean = float(np.mean(values))
    return Spread(
        round(mean, 2),
        int(np.min(values)),
        int(np.max(values)),
        round(float(np.std(values)) / mean, 5) if mean else 0.0,
    )


@dataclass(frozen=True)
class Budget:
    """What a training will consist of.

    Attributes:
        updates: Optimizer updates over all epochs.
        blocks: Training blocks.
        tokens, supervised_tokens: In one epoch.
        balance_cv: Variation of supervised tokens over the updates of the most frequent size.
        packing_efficiency: Share of the blocks' positions that hold tokens.
        padding_waste: What padding every example to max_length would waste instead.
    """

    updates: int
    blocks: int
    examples: int
    tokens: int
    supervised_tokens: int
    examples_per_update: Spread
    supervised_tokens_per_update: Spread
    tokens_per_update: Spread
    balance_cv: float
    packing_efficiency: float
    padding_waste: float

    def to_json(self) -> dict:
        return asdict(self)


def budget_of(
    packing: Packing, plan: UpdatePlan, lengths: npt.NDArray, supervised: npt.NDArray, max_length: int
) -> Budget:
    """The budget of a packing and its plan.

    Args:
        lengths: Tokens per example.
        supervised: Supervised tokens per example.
    """
    per_update = plan.sums(packing.sums(supervised))
    sizes = plan.sizes()
    usual = np.bincount(sizes).argmax() if len(sizes) else 0
    tokens = int(np.sum(lengths))
    return Budget(
        updates=plan.updates,
        blocks=packing.blocks,
        examples=len(lengths),
        tokens=tokens,
        supervised_tokens=int(np.sum(supervised)),
        examples_per_update=spread(plan.sums(np.diff(packing.starts))),
        supervised_tokens_per_update=spread(per_update),
        tokens_per_update=spread(plan.sums(packing.sums(lengths))),
        balance_cv=spread(per_update[sizes == usual]).cv,
        packing_efficiency=round(packing_efficiency(tokens, packing.blocks, max_length), 6),
        padding_waste=round(padding_waste(lengths, max_length), 6),
    )


def plan_budget(
    lengths: npt.NDArray,
    supervised: npt.NDArray,
    *,
    max_length: int,
    strategy: str,
    blocks_per_update: int,
    epochs: int,
    seed: int,
) -> Budget:
    """The budget of a training on examples of these lengths, as `packed_shards` would plan it (for `sft check`)."""
    packing = pack(lengths, max_length, strategy, seed)
    plan = plan_updates(packing.sums(supervised), blocks_per_update, epochs, seed)
    return budget_of(packing, plan, lengths, supervised, max_length)

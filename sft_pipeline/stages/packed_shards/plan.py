"""The update plan: which blocks form each optimizer update over all epochs, and what every update holds.

In every epoch all blocks are assigned anew to updates of at most `blocks_per_update`, as few updates as
that takes, and as even as they can be: 7 blocks at 4 per update are updates of 4 and 3. Within an epoch,
updates have nearly the same number of supervised tokens (where messages have loss weights: the same sum of
weights, which is what the loss is divided by), so that every gradient is an average over about as
much evidence, whatever the lengths. (Not all global batches of equal size are equal: 3 x 12 x 2 and 6 x 6 x 2
are both 72 examples per update, but with 5,200 and 4,300 supervised tokens per rank they hold 10,400 and
8,600 supervised tokens.) The plan knows nothing of devices: another world size re-divides the same updates
and changes no membership and no order. Pure numbers, light imports: `sft check` uses it before any training.
"""

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from sft_pipeline.errors import InputError
from sft_pipeline.spread import Spread, spread
from sft_pipeline.stages.packed_shards.packing import Ints, Packing

_ROUNDS = 60  # of swaps; a few suffice for packed blocks, more for lone examples of widely varying lengths
_CLOSE = 0.004  # two updates this close, as a share of the mean, are not evened out further
_SWAP_CELLS = 8_000_000  # differences computed in one round: bounds the memory


@dataclass(frozen=True)
class UpdatePlan:
    """Rows in the order of training; all arrays have one entry per (epoch, block).

    Attributes:
        update: 0, 0, ..., 1, 1, ... over all epochs.
        position: Index of the block within its update.
        block: Index of the block.
        epoch: 0, 1, ...
    """

    update: Ints
    position: Ints
    block: Ints
    epoch: Ints

    @property
    def updates(self) -> int:
        return int(self.update[-1]) + 1

    def sums(self, per_block: npt.NDArray) -> npt.NDArray:
        """Per update, the sum of a value per block: int64 or float64."""
        sums = np.bincount(self.update, weights=per_block[self.block], minlength=self.updates)
        return sums if per_block.dtype.kind == "f" else sums.astype(np.int64)

    def sizes(self) -> Ints:
        """Blocks per update."""
        return np.bincount(self.update, minlength=self.updates)


def plan_updates(weight: npt.NDArray, blocks_per_update: int, epochs: int, seed: int) -> UpdatePlan:
    """Plans all epochs.

    Args:
        weight: Of at least one block, the summed loss weights of its supervised tokens: their number, unless
            messages have weights of their own.
        blocks_per_update: What an update holds at most.

    Raises:
        InputError: There is no block.
    """
    if not len(weight):
        raise InputError("no block to train on: the train split has no example left; see its rejects.parquet")
    if weight.dtype.kind == "f" and weight.sum():
        weight = weight / weight.mean()  # the plan depends on their ratios alone
    parts = []
    done = 0
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        update, block = _plan_epoch(np.asarray(weight), blocks_per_update, rng)
        parts.append((update + done, block, np.full(len(block), epoch)))
        done += int(update[-1]) + 1
    update = np.concatenate([p[0] for p in parts])
    sizes = np.bincount(update, minlength=done)
    position = np.arange(len(update)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return UpdatePlan(
        update, position, np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])
    )


def _plan_epoch(weight: npt.NDArray, per_update: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """One epoch: (update, block) with updates ascending.

    Blocks are cut into layers by their weight; each update gets one block of each layer. Some
    layers are assigned by chance, so that epochs differ; each later one gives its richest block to the update
    that has the least so far. What one block per layer cannot even out, swaps do.
    """
    count = len(weight)
    updates = -(-count // per_update)
    ranked = rng.permutation(count)
    ranked = ranked[np.argsort(weight[ranked], kind="stable")]
    spare = count - updates * (count // updates)
    chosen = rng.choice(updates, size=spare, replace=False)
    # The blocks left over are those that weigh least: they disturb the balance least.
    extra, ranked = ranked[:spare], ranked[spare:]
    layers = ranked.reshape(-1, updates)
    totals = np.zeros(updates)
    totals[chosen] += weight[extra]
    members = np.empty_like(layers)  # (layer, update)
    by_chance, by_need = _order(weight, layers)
    for layer in [*by_chance, *by_need]:
        if layer in by_chance:
            owner = rng.permutation(updates)
        else:  # after the reversal the poorest update is last, beside the richest block
            owner = np.argsort(totals + rng.random(updates) * 1e-3, kind="stable")[::-1]
        totals[owner] += weight[layers[layer]]
        members[layer, owner] = layers[layer]
    _swap(weight, members, totals)
    owner = np.concatenate([chosen, np.tile(np.arange(updates), len(layers))])
    block = np.concatenate([extra, members.ravel()])
    # Neither the order within an update nor the order of updates may depend on lengths: both are shuffled.
    mixed = rng.permutation(len(block))
    new_number = rng.permutation(updates)
    owner, block = new_number[owner[mixed]], block[mixed]
    ordered = np.argsort(owner, kind="stable")
    return owner[ordered], block[ordered]


def _order(weight: npt.NDArray, layers: Ints) -> tuple[list[int], list[int]]:
    """The layers that are assigned by chance, and those that even things out, in the order of assignment.

    By chance: the layer whose blocks differ most (some update must have them), and a third of those that
    differ little. The others follow, those that differ most first, so that the finest corrections come last.
    """
    spread = [weight[layer[-1]] - weight[layer[0]] for layer in layers]
    widest = np.argsort(spread, kind="stable")[::-1].tolist()
    if len(widest) < 4:
        return widest[:1], widest[1:]
    finest = max(len(widest) - 2 - len(widest) // 3, 1)
    return [widest[0], *widest[finest:-2]], [*widest[1:finest], *widest[-2:]]


def _swap(weight: npt.NDArray, members: Ints, totals: npt.NDArray[np.float64]) -> None:
    """Evens out what is left, in place.

    The update that weighs most swaps a block with the one that weighs least, the second with
    the second but last, and so on, each pair the two blocks that bring them closest; until all are close or
    no swap helps.
    """
    layers, updates = members.shape
    for _ in range(_ROUNDS):
        ranked = np.argsort(totals, kind="stable")
        gap = totals[ranked[::-1]] - totals[ranked]
        pairs = int(np.count_nonzero(gap[: updates // 2] > _CLOSE * totals.mean()))
        pairs = min(pairs, max(_SWAP_CELLS // layers**2, 1))
        if not pairs:
            return
        poor, rich = ranked[:pairs], ranked[::-1][:pairs]
        # (pair, block of the rich one, block of the poor one)
        given = weight[members[:, rich]].T[:, :, None] - weight[members[:, poor]].T[:, None, :]
        off = np.abs(given - gap[:pairs, None, None] / 2).reshape(pairs, -1)
        best = off.argmin(axis=1)
        helps = off[np.arange(pairs), best] < gap[:pairs] / 2
        if not helps.any():
            return
        of_rich, of_poor = np.divmod(best[helps], layers)
        poor, rich = poor[helps], rich[helps]
        moved = given.reshape(pairs, -1)[helps, best[helps]]
        members[of_rich, rich], members[of_poor, poor] = members[of_poor, poor], members[of_rich, rich]
        totals[rich] -= moved
        totals[poor] += moved


@dataclass(frozen=True)
class PlanBudget:
    """What a training will consist of.

    Attributes:
        updates: Optimizer updates over all epochs.
        blocks: Training blocks.
        tokens, supervised_tokens: In one epoch.
        loss_weight_per_update: Summed weights of the supervised tokens; None where each counts 1.
        balance_cv: Variation of these sums (of the supervised tokens) over the updates of the most frequent
            size.
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
    loss_weight_per_update: Spread | None
    tokens_per_update: Spread
    balance_cv: float
    packing_efficiency: float
    padding_waste: float

    def to_json(self) -> dict:
        return asdict(self)


def budget_of(
    packing: Packing,
    plan: UpdatePlan,
    lengths: npt.NDArray,
    supervised: npt.NDArray,
    weight: npt.NDArray,
    max_length: int,
) -> PlanBudget:
    """The budget of a packing and its plan.

    Args:
        lengths: Tokens per example.
        supervised: Supervised tokens per example.
        weight: The sum of their loss weights.
    """
    per_update = plan.sums(packing.sums(weight))
    sizes = plan.sizes()
    usual = np.bincount(sizes).argmax()
    tokens = int(np.sum(lengths))
    return PlanBudget(
        updates=plan.updates,
        blocks=packing.blocks,
        examples=len(lengths),
        tokens=tokens,
        supervised_tokens=int(np.sum(supervised)),
        examples_per_update=spread(plan.sums(np.diff(packing.starts))),
        supervised_tokens_per_update=spread(plan.sums(packing.sums(supervised))),
        loss_weight_per_update=None if np.array_equal(weight, supervised) else spread(per_update),
        tokens_per_update=spread(plan.sums(packing.sums(lengths))),
        balance_cv=spread(per_update[sizes == usual]).cv,
        packing_efficiency=round(tokens / (packing.blocks * max_length), 6),
        padding_waste=round(1 - tokens / (len(lengths) * max_length), 6),
    )

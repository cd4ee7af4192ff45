"""The update plan: which blocks form each optimizer update, over all epochs.

Every epoch deals all blocks anew into updates of `blocks_per_update`; blocks that are left over are spread one per
update. Within an epoch, updates have nearly the same number of supervised tokens, so that every gradient is an average
over about as much evidence, whatever the lengths. The plan knows nothing of devices: another world size re-divides the
same updates and changes no membership and no order.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]

_ROUNDS = 60  # of swaps; a few do where blocks are packed, more where lengths are wild and nothing is packed
_CLOSE = 0.004  # two updates this close, as a share of the mean, are let be
_SWAP_CELLS = 8_000_000  # differences looked at in one round: bounds the memory


@dataclass(frozen=True)
class UpdatePlan:
    """Rows in the order of training; all arrays have one entry per (epoch, block).

    Attributes:
        update: 0, 0, ..., 1, 1, ... over all epochs.
        position: Place of the block within its update.
        block: Index of the block.
        epoch: 0, 1, ...
    """

    update: Ints
    position: Ints
    block: Ints
    epoch: Ints

    @property
    def updates(self) -> int:
        return int(self.update[-1]) + 1 if len(self.update) else 0

    def sums(self, per_block: Ints) -> Ints:
        """Per update, the sum of a value per block."""
        return np.bincount(self.update, weights=per_block[self.block], minlength=self.updates).astype(
            np.int64
        )

    def sizes(self) -> Ints:
        """Blocks per update."""
        return np.bincount(self.update, minlength=self.updates)


def plan_updates(supervised: Ints, blocks_per_update: int, epochs: int, seed: int) -> UpdatePlan:
    """Plans all epochs.

    Args:
        supervised: Supervised tokens per block.
        blocks_per_update: What an update holds; where there are fewer blocks, one update holds them all.
    """
    parts = []
    done = 0
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        update, block = _deal(np.asarray(supervised), blocks_per_update, rng)
        parts.append((update + done, block, np.full(len(block), epoch)))
        done += int(update[-1]) + 1 if len(update) else 0
    update = np.concatenate([p[0] for p in parts])
    sizes = np.bincount(update, minlength=done)
    position = np.arange(len(update)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return UpdatePlan(
        update, position, np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts])
    )


def _deal(supervised: Ints, per_update: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """One epoch: (update, block) with updates ascending.

    Blocks are cut into layers by their supervised tokens; each update gets one block of each layer. Some layers are
    dealt by chance, so that epochs differ; each later one gives its richest block to the update that has the least
    so far. What one block per layer cannot even out, swaps do.
    """
    count = len(supervised)
    updates = max(count // per_update, 1)
    ranked = rng.permutation(count)
    ranked = ranked[np.argsort(supervised[ranked], kind="stable")]
    spare = count - updates * (count // updates)
    chosen = rng.choice(updates, size=spare, replace=False)
    extra, ranked = (
        ranked[:spare],
        ranked[spare:],
    )  # the poorest blocks are the ones left over: they disturb least
    layers = ranked.reshape(-1, updates) if updates else ranked.reshape(0, 0)
    totals = np.zeros(updates)
    totals[chosen] += supervised[extra]
    members = np.empty_like(layers)  # (layer, update)
    by_chance, by_need = _order(supervised, layers)
    for place in [*by_chance, *by_need]:
        if place in by_chance:
            owner = rng.permutation(updates)
        else:  # the poorest update (first in ascending order) takes the richest block
            owner = np.argsort(totals + rng.random(updates) * 1e-3, kind="stable")[::-1]
        totals[owner] += supervised[layers[place]]
        members[place, owner] = layers[place]
    _swap(supervised, members, totals)
    owner = np.concatenate([chosen, np.tile(np.arange(updates), len(layers))])
    block = np.concatenate([extra, members.ravel()])
    mixed = rng.permutation(len(block))  # the order within an update must not tell its lengths
    place_of = rng.permutation(updates)  # nor the order of updates
    owner, block = place_of[owner[mixed]], block[mixed]
    ordered = np.argsort(owner, kind="stable")
    return owner[ordered], block[ordered]


def _order(supervised: Ints, layers: Ints) -> tuple[list[int], list[int]]:
    """The layers that are dealt by chance, and those that even things out, in the order of dealing.

    By chance: the layer whose blocks differ most (somebody must have them), and a third of those that differ little.
    The others follow, those that differ most first, so that the finest corrections come last.
    """
    spread = [int(supervised[layer[-1]]) - int(supervised[layer[0]]) for layer in layers]
    widest = np.argsort(spread, kind="stable")[::-1].tolist()
    if len(widest) < 4:
        return widest[:1], widest[1:]
    finest = max(len(widest) - 2 - len(widest) // 3, 1)
    return [widest[0], *widest[finest:-2]], [*widest[1:finest], *widest[-2:]]


def _swap(supervised: Ints, members: Ints, totals: npt.NDArray[np.float64]) -> None:
    """Evens out what is left, in place: the richest update swaps a block with the poorest, the second richest with the
    second poorest, and so on, each pair the two blocks that bring them closest; until all are close or nothing helps."""
    layers, updates = members.shape
    for _ in range(_ROUNDS):
        ranked = np.argsort(totals, kind="stable")
        gap = totals[ranked[::-1]] - totals[ranked]
        pairs = int(np.count_nonzero(gap[: updates // 2] > _CLOSE * totals.mean()))
        pairs = min(pairs, max(_SWAP_CELLS // layers**2, 1))
        if not pairs:
            return
        poor, rich = ranked[:pairs], ranked[::-1][:pairs]
        given = (
            supervised[members[:, rich]].T[:, :, None] - supervised[members[:, poor]].T[:, None, :]
        )  # (pair, of rich, of poor)
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

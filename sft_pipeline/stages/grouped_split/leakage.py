"""Near-duplicates between sides: which rows are dropped for them, and how many are left."""

from dataclasses import dataclass

import numpy as np

from sft_pipeline.stages.grouped_split.near_duplicates import Index, ShingleSets, cluster_of, neighbours
from sft_pipeline.stages.grouped_split.split import SIDES, TEST, TRAIN, VALIDATION


@dataclass(frozen=True)
class Straddling:
    """Rows in a cluster with a row that is held out from them, by ascending row.

    Attributes:
        row: The row (int64).
        near: The row that it is a near-duplicate of: on the held-out side, or one link nearer to it.
        similarity: Their Jaccard similarity.
    """

    row: np.ndarray
    near: np.ndarray
    similarity: np.ndarray

    @classmethod
    def none(cls) -> "Straddling":
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def straddling(sets: ShingleSets, index: Index, side: np.ndarray) -> Straddling:
    """Finds train rows whose cluster reaches a validation or test row, and validation rows whose cluster reaches test.

    A cluster is everything that hangs together by pairs at or above the index's threshold. With these rows gone, none is left
    on two sides.

    Args:
        side: Index into SIDES per row (int8).
    """
    first = _first_rows(sets, side)
    is_node = sets.node == np.arange(len(sets))
    taken = np.zeros(len(sets), bool)
    rows, near, similarity = [], [], []
    for held_out, lower in ((TEST, (TRAIN, VALIDATION)), (VALIDATION, (TRAIN,))):
        start = (first[held_out] >= 0) & ~taken
        one, other, found = cluster_of(sets, index, start, is_node & ~taken)
        link, strength = np.full(len(sets), -1), np.ones(len(sets))
        # The neighbour shown is a held-out row where its set has one, else any row of it.
        shown = np.where(first[held_out] >= 0, first[held_out], np.arange(len(sets)))
        link[one], strength[one] = shown[other], found
        link[start] = first[held_out][start]
        taken |= link >= 0
        dropped = np.flatnonzero((link[sets.node] >= 0) & np.isin(side, lower))
        rows.append(dropped)
        near.append(link[sets.node[dropped]])
        similarity.append(strength[sets.node[dropped]])
    row = np.concatenate(rows)
    order = np.argsort(row, kind="stable")
    return Straddling(row[order], np.concatenate(near)[order], np.concatenate(similarity)[order])


def leaked(sets: ShingleSets, index: Index, side: np.ndarray) -> dict[str, int]:
    """Held-out rows with a near-duplicate on another side: for validation one in train, for test one in train or validation.

    Args:
        side: Index into SIDES per row (int8); -1 for a row that is on none.
    """
    first = _first_rows(sets, side)
    found = {}
    for held_out, lower in ((VALIDATION, (TRAIN,)), (TEST, (TRAIN, VALIDATION))):
        near = np.any([first[s] >= 0 for s in lower], axis=0)
        asked = first[held_out] >= 0
        hit = near & asked
        hit[neighbours(sets, index, near, asked & ~near)[0]] = True
        found[SIDES[held_out]] = int((hit[sets.node] & (side == held_out)).sum())
    return found


def _first_rows(sets: ShingleSets, side: np.ndarray) -> np.ndarray:
    """For each side and node the first row there with the node's set, or -1 (int64 [sides, rows])."""
    first = np.full((len(SIDES), len(sets)), -1)
    for s in range(len(SIDES)):
        rows = np.flatnonzero(side == s)[::-1]
        first[s][sets.node[rows]] = rows
    return first

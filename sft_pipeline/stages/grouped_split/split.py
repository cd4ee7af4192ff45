"""The side of a group: fixed by hand, else by time, else by the salt. Groups never move."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.validated_rows.rows import time_of

SIDES = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


def fraction_of(salt: str, group: str) -> float:
    """A number in [0, 1) that depends on the salt and the group only: the first 64 bits of their SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{group}".encode()).digest()[:8], "big") / 2**64


def salted_side(config: SplitConfig, group: str) -> int:
    """The side that the salt gives a group: test below `test`, validation in the next `validation`, else train."""
    fraction = fraction_of(config.salt, group)
    if fraction < config.test:
        return TEST
    return VALIDATION if fraction < config.test + config.validation else TRAIN


class Sides:
    """The side of every group of one dataset.

    Args:
        first_times: With a time cutoff: the ISO time of each group's first row.
    """

    def __init__(self, config: SplitConfig, first_times: dict[str, str] | None = None) -> None:
        self._config = config
        self._fixed = {g: i for i, side in enumerate(SIDES) for g in getattr(config.groups, side)}
        self._times = first_times or {}
        self._cutoff = time_of(config.time_cutoff)
        self.fixed_found: set[str] = set()

    def of(self, group: str) -> int:
        """The side of one group, as an index into SIDES."""
        if group in self._fixed:
            self.fixed_found.add(group)
            return self._fixed[group]
        if self._cutoff and self._times.get(group, "") >= self._cutoff:
            return TEST
        return salted_side(self._config, group)

    def of_rows(self, groups: pa.Array) -> np.ndarray:
        """The side of each row (int8), given the rows' groups."""
        encoded = groups.dictionary_encode()
        sides = np.array([self.of(g) for g in encoded.dictionary.to_pylist()], dtype=np.int8)
        return sides[encoded.indices.to_numpy(zero_copy_only=False)] if len(groups) else sides

    @property
    def fixed_missing(self) -> list[str]:
        """Groups fixed by hand that no row asked for."""
        return sorted(self._fixed.keys() - self.fixed_found)


def first_times(batches: Iterable[pa.RecordBatch]) -> dict[str, str]:
    """The earliest time of each group; batches have the columns group and time."""
    found: dict[str, str] = {}
    for batch in batches:
        for group, time in zip(batch.column("group").to_pylist(), batch.column("time").to_pylist()):
            if time is not None and time < found.get(group, "~"):
                found[group] = time
    return found


def overlap(groups_by_side: Sequence[pa.Array]) -> list[str]:
    """Groups that are on more than one side, given each side's distinct groups."""
    import pyarrow.compute as pc

    found: list[str] = []
    for i, one in enumerate(groups_by_side):
        for other in groups_by_side[i + 1 :]:
            found += one.filter(pc.is_in(one, value_set=other)).to_pylist()
    return sorted(set(found))

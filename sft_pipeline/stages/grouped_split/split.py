"""The split of a group: fixed by hand, else by time, else by the salt. Groups never move."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.tables.schemas import SPLITS, time_of

TRAIN, VALIDATION, TEST = range(3)
"""Indices into SPLITS."""


class SplitAssignment:
    """The split of every group of one dataset.

    Args:
        first_times: With a time cutoff: the ISO time of each group's first row.
    """

    def __init__(self, config: SplitConfig, first_times: dict[str, str] | None = None) -> None:
        self._config = config
        self._fixed = {g: i for i, split in enumerate(SPLITS) for g in getattr(config.groups, split)}
        self._times = first_times or {}
        self._cutoff = time_of(config.time_cutoff)
        self._fixed_found: set[str] = set()

    def of(self, groups: Sequence[str]) -> np.ndarray:
        """The split of each group (int8), as an index into SPLITS."""
        splits = salted_splits(self._config, groups)
        if self._cutoff:
            late = [self._times.get(g, "") >= self._cutoff for g in groups]
            splits[np.array(late, bool)] = TEST
        if self._fixed:
            for i, group in enumerate(groups):
                if group in self._fixed:
                    splits[i] = self._fixed[group]
                    self._fixed_found.add(group)
        return splits

    def of_rows(self, groups: pa.Array) -> np.ndarray:
        """The split of each row (int8), given the rows' groups."""
        encoded = groups.dictionary_encode()
        return self.of(encoded.dictionary.to_pylist())[encoded.indices.to_numpy(zero_copy_only=False)]

    @property
    def fixed_missing(self) -> list[str]:
        """Groups fixed by hand that no row has had so far."""
        return sorted(self._fixed.keys() - self._fixed_found)


def salted_splits(config: SplitConfig, groups: Sequence[str]) -> np.ndarray:
    """The split that the salt gives each group (int8).

    Test where the group's fraction is below `test`, validation in the next `validation`, else train: so a
    held-out group stays held out when more groups come, and when the fractions grow.
    """
    fractions = fractions_of(config.salt, groups)
    held_out = np.where(fractions < config.test, TEST, VALIDATION)
    return np.where(fractions < config.test + config.validation, held_out, TRAIN).astype(np.int8)


def fractions_of(salt: str, groups: Sequence[str]) -> np.ndarray:
    """A number in [0, 1] per group, of salt and group alone: the first 64 bits of their SHA-256."""
    prefix = f"{salt}\0".encode()
    digests = b"".join([hashlib.sha256(prefix + group.encode()).digest() for group in groups])
    return np.frombuffer(digests, ">u8")[::4] / 2**64


def first_times(batches: Iterable[pa.RecordBatch]) -> dict[str, str]:
    """The earliest time of each group; batches have the columns group and time."""
    found: dict[str, str] = {}
    for batch in batches:
        for group, time in zip(batch.column("group").to_pylist(), batch.column("time").to_pylist()):
            if time is not None and time < found.get(group, "~"):  # "~" sorts after every ISO time
                found[group] = time
    return found


def overlap(groups_by_split: Sequence[pa.Array]) -> list[str]:
    """Groups that are in more than one split, given each split's distinct groups."""
    found: list[str] = []
    for i, one in enumerate(groups_by_split):
        for other in groups_by_split[i + 1 :]:
            found += one.filter(pc.is_in(one, value_set=other)).to_pylist()
    return sorted(set(found))

"""A set of 128-bit digests that takes 16 bytes for each, and whole batches at a time."""

import numpy as np


class Seen:
    """Remembers digests.

    They lie in a few sorted arrays, each more than twice as long as the next, so a digest is looked for a few times and
    moved about as often as there are arrays.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Adds digests (a NumPy bytes dtype); returns a mask of those that were not there before, each once."""
        distinct, first = np.unique(digests, return_index=True)
        known = np.zeros(len(distinct), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[at] == distinct
        new = np.zeros(len(digests), bool)
        new[first[~known]] = True
        self._keep(distinct[~known])
        return new

    def _keep(self, run: np.ndarray) -> None:
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate((self._runs.pop(), run))
            run.sort(kind="stable")  # two sorted halves: this merges them
        if len(run):
            self._runs.append(run)

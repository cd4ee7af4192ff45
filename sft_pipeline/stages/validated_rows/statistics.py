"""What is kept over all batches: digests of rows and groups, and statistics of the accepted rows."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class DigestSet:
    """128-bit digests in 16 bytes each, added whole batches at a time.

    They lie in a few sorted arrays, each more than twice as long as the next, so that a lookup takes a few
    binary searches and a digest is moved about as often as there are arrays. (A Python set takes 100 bytes
    per digest.)
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Adds digests (a NumPy bytes dtype); returns a mask of those that are new, each once."""
        distinct, first = np.unique(digests, return_index=True)
        known = np.zeros(len(distinct), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            known |= run[at] == distinct
        new = np.zeros(len(digests), bool)
        new[first[~known]] = True
        run = distinct[~known]
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate((self._runs.pop(), run))
            run.sort(kind="stable")  # two sorted halves: a stable sort merges them
        if len(run):
            self._runs.append(run)
        return new


class RowStatistics:
    """Counts over accepted rows; takes 24 bytes per row."""

    def __init__(self) -> None:
        self.warned = 0
        self.warnings: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()  # rows by the key that nothing reads
        self.arranged: Counter[str] = (
            Counter()
        )  # turns by the key of the contract that merged or left them out
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self._groups = DigestSet()
        self._prompts: list[np.ndarray] = []
        self._completions: list[np.ndarray] = []

    @property
    def groups(self) -> int:
        return len(self._groups)

    @property
    def prompt_characters(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *self._prompts])

    @property
    def completion_characters(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *self._completions])

    def add(self, rows: pa.RecordBatch, groups: np.ndarray) -> None:
        """Counts rows (with the columns of `VALIDATED`); `groups` are the digests of their groups."""
        if not rows.num_rows:
            return
        self._groups.add(groups)
        warnings = rows.column("warnings")
        _count(self.warnings, pc.list_flatten(warnings))
        self.warned += int(np.count_nonzero(pc.list_value_length(warnings)))
        messages = rows.column("messages")
        # Every row has messages, so each begins where the one before it ends.
        ends = np.cumsum(pc.list_value_length(messages))
        starts = ends - pc.list_value_length(messages).to_numpy()
        flat = pc.list_flatten(messages)
        roles, contents, calls = (pc.struct_field(flat, n) for n in ("role", "content", "tool_calls"))
        _count(self.roles, roles)
        replies = np.add.reduceat(
            pc.equal(roles, "assistant").to_numpy(zero_copy_only=False), starts, dtype=int
        )
        _count(self.turns, pa.array(replies))
        lengths = pc.utf8_length(contents).to_numpy()
        whole = np.add.reduceat(lengths, starts)
        last = ends - 1
        self._prompts.append(whole - lengths[last])
        self._completions.append(
            lengths[last] + pc.fill_null(pc.utf8_length(calls.take(pa.array(last))), 0).to_numpy()
        )


def _count(counts: Counter, values: pa.Array) -> None:
    for entry in pc.value_counts(values).to_pylist():
        counts[entry["values"]] += entry["counts"]

"""What each split holds, as its rows were written and as its files are read back, and the checks on both."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.shingles import is_system
from sft_pipeline.stages.stage import Check, Evidence, number, table
from sft_pipeline.tables import parquet
from sft_pipeline.tables.schemas import SPLITS

MAX_LABELS = 100
MAX_TRAIN_LOST = 0.2  # of the train rows, as near-duplicates of held-out ones
_TOO_MANY_NEAR = (
    "Rows that share a template look alike. Put the rows of one template into one group, raise "
    "split.near_duplicates.threshold, or set split.near_duplicates.action: report (or split.near_duplicates: "
    "null) where such rows are no leak"
)
_MERGE_GROUPS = 64  # batches after which their distinct groups are joined


@dataclass
class SplitSummary:
    """One split, as its rows were given to the writer.

    Attributes:
        labels: How often each completion occurs; None where there are more than MAX_LABELS of them (no
            labels, then).
    """

    rows: int = 0
    turns: int = 0
    sources: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] | None = field(default_factory=Counter)
    _characters: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    _ids: Any = field(default_factory=hashlib.sha256)

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts rows in (columns row_id, source and messages)."""
        if not batch.num_rows:
            return
        messages = batch.column("messages")
        flat = messages.flatten()
        ends = messages.offsets.to_numpy() - messages.offsets[0].as_py()
        self.rows += batch.num_rows
        self.turns += pc.sum(pc.equal(flat.field("role"), "assistant")).as_py() or 0
        self.sources.update(_counts(batch.column("source")))
        if self.labels is not None:
            self.labels.update(_counts(flat.field("content").take(pa.array(ends[1:] - 1)), MAX_LABELS + 1))
            if len(self.labels) > MAX_LABELS:
                self.labels = None
        content, calls = (
            pc.fill_null(pc.utf8_length(flat.field(name)), 0).to_numpy(zero_copy_only=False)
            for name in ("content", "tool_calls")
        )
        by_system = is_system(flat).to_numpy(zero_copy_only=False)
        total = np.concatenate([[0], np.cumsum(np.where(by_system, 0, content.astype(np.int64) + calls))])
        self._characters.append(total[ends[1:]] - total[ends[:-1]])
        self._ids.update(_as_lines(batch.column("row_id")))

    @property
    def row_ids(self) -> str:
        """A digest over the row ids in order."""
        return self._ids.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """Characters of each row's messages without the system's (int64 [rows])."""
        return np.concatenate(self._characters)

    def to_json(self, groups: int) -> dict[str, Any]:
        lengths = self.lengths
        characters = None
        if self.rows:
            characters = {
                "mean": round(float(lengths.mean()), 1),
                "median": int(np.median(lengths)),
                "p95": int(np.percentile(lengths, 95)),
                "max": int(lengths.max()),
            }
        return {
            "rows": self.rows,
            "groups": groups,
            "turns": self.turns,
            "characters": characters,
            "rows_by_source": {str(k): v for k, v in sorted(self.sources.items())},
        }


def _as_lines(row_ids: pa.StringArray) -> bytes:
    """Row ids for a digest that does not depend on how they are cut into batches."""
    return "".join(f"{i}\n" for i in row_ids.to_pylist()).encode()


def _counts(values: pa.Array, limit: int | None = None) -> dict[Any, int]:
    """How often each of the first `limit` distinct values occurs."""
    return {c["values"]: c["counts"] for c in pc.value_counts(values)[:limit].to_pylist()}


@dataclass(frozen=True)
class SplitOnDisk:
    """One split, as its files hold it.

    Attributes:
        groups: Its distinct groups.
        row_ids: A digest over the row ids in order.
    """

    rows: int
    groups: pa.Array
    row_ids: str


def read_back(paths: Iterable[Path]) -> SplitOnDisk:
    """Reads one split's files, a batch at a time."""
    groups, ids, rows = [pa.array([], pa.string())], hashlib.sha256(), 0
    for batch in parquet.read_batches(paths, ["row_id", "group"], parquet.ROW_GROUP):
        rows += batch.num_rows
        ids.update(_as_lines(batch.column("row_id")))
        groups.append(pc.unique(batch.column("group")))
        if len(groups) > _MERGE_GROUPS:
            groups = [pc.unique(pa.concat_arrays(groups))]
    return SplitOnDisk(rows, pc.unique(pa.concat_arrays(groups)), ids.hexdigest())


@dataclass(frozen=True)
class SplitOutcome:
    """What came of a split.

    Attributes:
        read, rejects, near_duplicates: Rows.
        written: Per split, the rows that its writer was given.
        on_disk: Per split, what its files hold, read back.
        shared_groups: Groups that are in two splits, by the files.
        fixed_missing: Groups put into a split by hand that are not in the data.
        assigned: Rows by the split of their group, before any were dropped.
        dropped_from_train: Rows.
        leaks: Per held-out split (its rows with a near-duplicate left in another split, rows looked at);
            None: not searched.
        worst_pairs: The most similar near-duplicates.
        uneven: As `uneven_shares` says.
        largest_group: Its name and its rows, where shares are uneven.
    """

    read: int
    rejects: int
    near_duplicates: int
    written: Mapping[str, SplitSummary]
    on_disk: Mapping[str, SplitOnDisk]
    shared_groups: list[str]
    fixed_missing: list[str]
    assigned: Mapping[str, int]
    dropped_from_train: int
    leaks: dict[str, tuple[int, int]] | None
    worst_pairs: list[dict[str, Any]]
    uneven: Mapping[str, float] = field(default_factory=dict)
    largest_group: tuple[str, int] | None = None

    @property
    def counts(self) -> dict[str, int]:
        return {
            "read": self.read,
            **{name: s.rows for name, s in self.on_disk.items()},
            "rejects": self.rejects,
            "near_duplicates": self.near_duplicates,
            **{f"{name}_groups": len(s.groups) for name, s in self.on_disk.items()},
        }

    @property
    def leakage(self) -> float | None:
        """The fraction of held-out rows, of those looked at, with a near-duplicate in another split."""
        if self.leaks is None:
            return None
        hits, looked_at = map(sum, zip(*self.leaks.values()))
        return hits / max(1, looked_at)


def checks(config: SplitConfig, outcome: SplitOutcome) -> tuple[Check, ...]:
    """The stage's checks, as asset.py declares them."""
    shared, missing, rejects = outcome.shared_groups, outcome.fixed_missing, outcome.rejects
    kept = sum(outcome.counts[name] for name in SPLITS)
    wrong = [name for name in SPLITS if outcome.on_disk[name].row_ids != outcome.written[name].row_ids]
    unlike = f"; the files of {', '.join(wrong)} hold other rows than were assigned to them" if wrong else ""
    return (
        Check(
            "group_overlap",
            not shared,
            f"{len(shared)} groups are in two splits{_some(shared)}",
            {"groups": number(len(shared))},
        ),
        _leakage_check(config, outcome),
        _not_empty_check(config, outcome),
        Check(
            "counts_add_up",
            kept + rejects == outcome.read and not wrong,
            f"{kept:,} in the three splits + {rejects:,} rejects = {kept + rejects:,} of {outcome.read:,} "
            f"read{unlike}",
        ),
        Check(
            "fixed_groups_found",
            not missing,
            f"{len(missing)} groups of split.groups are not in the data{_some(missing)}",
        ),
        _shares_check(config, outcome),
        _train_kept_check(config, outcome),
    )


def uneven_shares(config: SplitConfig, outcome: SplitOutcome) -> dict[str, float]:
    """The held-out splits with less than half or more than double the share of rows asked for, and their
    shares. Splits with groups chosen by hand or by time are as they were chosen.
    """
    asked = {"validation": config.validation, "test": config.test}
    found = {}
    for name, share in asked.items():
        rows = outcome.assigned[name]
        chosen = getattr(config.groups, name) or (name == "test" and config.time_cutoff)
        if share and rows and not chosen and not share / 2 <= rows / outcome.read <= share * 2:
            found[name] = rows / outcome.read
    return found


def _shares_check(config: SplitConfig, outcome: SplitOutcome) -> Check:
    total = max(outcome.read, 1)
    description = "rows by split: " + ", ".join(f"{s} {n / total:.1%}" for s, n in outcome.assigned.items())
    if outcome.uneven and outcome.largest_group:
        group, rows = outcome.largest_group
        asked = ", ".join(f"{name} {getattr(config, name):.3g}" for name in outcome.uneven)
        description += (
            f"; asked for {asked}. Groups are drawn whole, and their sizes differ: the largest, {group!r}, "
            f"has {rows / total:.1%} of the rows. Choose a finer group column, or assign groups by hand with "
            "split.groups"
        )
    return Check("split_shares", not outcome.uneven, description)


def _train_kept_check(config: SplitConfig, outcome: SplitOutcome) -> Check:
    assigned, lost = outcome.assigned["train"], outcome.dropped_from_train
    share = lost / max(assigned, 1)
    description = f"{lost:,} of {assigned:,} train rows ({share:.1%}) were dropped as near-duplicates"
    if share > MAX_TRAIN_LOST:
        description += " of held-out rows; near_duplicates.parquet lists them. " + _TOO_MANY_NEAR
    return Check("train_rows_kept", share <= MAX_TRAIN_LOST, description)


def _some(names: list[str]) -> str:
    return f": {', '.join(names[:5])}" if names else ""


def _not_empty_check(config: SplitConfig, outcome: SplitOutcome) -> Check:
    wanted = {
        "train": True,
        "validation": bool(config.validation or config.groups.validation),
        "test": bool(config.test or config.groups.test or config.time_cutoff),
    }
    empty = [name for name, needed in wanted.items() if needed and not outcome.on_disk[name].rows]
    description = "every split has its rows"
    if empty:
        description = (
            f"no rows in {', '.join(empty)}. Add groups, assign some by hand with split.groups, raise the "
            "fraction, or set the split's fraction to 0"
        )
        if "train" in empty and outcome.dropped_from_train:
            description = (
                f"all {outcome.dropped_from_train:,} train rows were dropped as near-duplicates of held-out "
                f"rows. {_TOO_MANY_NEAR}"
            )
    sizes = [{"split": name, "rows": s.rows, "groups": len(s.groups)} for name, s in outcome.on_disk.items()]
    return Check("splits_not_empty", not empty, description, {"splits": table(sizes)})


def _leakage_check(config: SplitConfig, outcome: SplitOutcome) -> Check:
    near, leakage = config.near_duplicates, outcome.leakage
    if near is None or leakage is None:
        return Check(
            "near_duplicate_leakage",
            True,
            "the search for near-duplicates is switched off (near_duplicates: null)",
        )
    drops = near.action == "drop_from_train"
    bound = near.max_leakage if near.max_leakage is not None else (0.0 if drops else 1.0)
    details: dict[str, Evidence] = {
        "leakage": number(leakage),
        "bound": number(bound),
        "dropped": number(outcome.rejects),
        "found": number(outcome.near_duplicates),
    }
    if outcome.worst_pairs:
        details["worst_pairs"] = table(outcome.worst_pairs)
    looked_at = (
        f" (of {sum(n for _, n in (outcome.leaks or {}).values()):,} looked at again)" if drops else ""
    )
    action = (
        f"{outcome.rejects:,} rows were dropped"
        if drops
        else f"{outcome.near_duplicates:,} rows are near-duplicates across splits and were only reported"
    )
    return Check(
        "near_duplicate_leakage",
        leakage <= bound,
        f"{leakage:.2%} of the held-out rows{looked_at} have a near-duplicate (similarity "
        f"{near.threshold:g} or more) left in another split; at most {bound:.2%} is allowed; {action}",
        details,
    )

"""What grouped_split tells: counts, split.json, its checks, and evidence for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.plots import charts
from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.split import SIDES
from sft_pipeline.stages.grouped_split.summary import OnDisk, SideSummary
from sft_pipeline.stages.painter import Painter
from sft_pipeline.stages.stage import Check, Evidence, number, plot, table
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.schemas import ROWS


@dataclass(frozen=True)
class Outcome:
    """What came of a split.

    Attributes:
        read, rejects, near_duplicates: Rows.
        handed: Per side, the rows that were handed to its writer.
        held: Per side, what its files hold, read back.
        shared_groups: Groups that are on two sides, by the files.
        fixed_missing: Groups put on a side by hand that are not in the data.
        leaks: Per held-out side, its rows with a near-duplicate left on another side; None: not searched.
        worst_pairs: The most similar near-duplicates.
    """

    read: int
    rejects: int
    near_duplicates: int
    handed: Mapping[str, SideSummary]
    held: Mapping[str, OnDisk]
    shared_groups: list[str]
    fixed_missing: list[str]
    leaks: dict[str, int] | None
    worst_pairs: list[dict[str, Any]]

    @property
    def counts(self) -> dict[str, int]:
        return {
            "read": self.read,
            **{name: s.rows for name, s in self.held.items()},
            "rejects": self.rejects,
            "near_duplicates": self.near_duplicates,
            **{f"{name}_groups": len(s.groups) for name, s in self.held.items()},
        }

    @property
    def leakage(self) -> float | None:
        """The fraction of held-out rows with a near-duplicate on another side."""
        if self.leaks is None:
            return None
        return sum(self.leaks.values()) / max(1, self.held["validation"].rows + self.held["test"].rows)

    @property
    def unlike(self) -> list[str]:
        """Sides whose files do not hold exactly the rows that they should, in order."""
        return [name for name in SIDES if self.held[name].row_ids != self.handed[name].row_ids]


def write_summary(path: Path, config: SplitConfig, outcome: Outcome) -> None:
    """Writes split.json."""
    labels = [s.labels for s in outcome.handed.values() if s.labels is not None]
    write_json(
        path,
        {
            "salt": config.salt,
            "fractions": {"validation": config.validation, "test": config.test},
            "fixed_groups": config.groups.model_dump(mode="json"),
            "time_cutoff": config.time_cutoff,
            "counts": outcome.counts,
            "sides": {name: s.to_json(len(outcome.held[name].groups)) for name, s in outcome.handed.items()},
            "labels": {n: dict(sorted((s.labels or {}).items())) for n, s in outcome.handed.items()}
            if len(labels) == len(SIDES)
            else None,
            "group_overlap": len(outcome.shared_groups),
            "near_duplicates": None
            if config.near_duplicates is None
            else {
                **config.near_duplicates.model_dump(mode="json"),
                "found": outcome.near_duplicates,
                "dropped": outcome.rejects,
                "left": outcome.leaks,
                "leakage": outcome.leakage,
            },
        },
    )


def checks(config: SplitConfig, outcome: Outcome) -> tuple[Check, ...]:
    """The stage's checks, as asset.py declares them."""
    counts, shared = outcome.counts, outcome.shared_groups
    kept = sum(counts[name] for name in SIDES)
    added = f"{kept:,} on the three sides + {outcome.rejects:,} rejects = {kept + outcome.rejects:,} of {outcome.read:,} read"
    unlike = f"; the files of {', '.join(outcome.unlike)} hold other rows than were dealt to them"
    return (
        Check(
            "group_overlap",
            not shared,
            f"{len(shared)} groups are on two sides{_some(shared)}",
            {"groups": number(len(shared))},
        ),
        _leakage_check(config, outcome),
        _sides_check(config, outcome),
        Check(
            "counts_add_up",
            kept + outcome.rejects == outcome.read and not outcome.unlike,
            added + (unlike if outcome.unlike else ""),
        ),
        Check(
            "fixed_groups_found",
            not outcome.fixed_missing,
            f"{len(outcome.fixed_missing)} groups of split.groups are not in the data{_some(outcome.fixed_missing)}",
        ),
    )


def _some(names: list[str]) -> str:
    return f": {', '.join(names[:5])}" if names else ""


def _sides_check(config: SplitConfig, outcome: Outcome) -> Check:
    wanted = {
        "train": True,
        "validation": bool(config.validation or config.groups.validation),
        "test": bool(config.test or config.groups.test or config.time_cutoff),
    }
    empty = [name for name, needed in wanted.items() if needed and not outcome.held[name].rows]
    told = (
        f"no rows in {', '.join(empty)}. Add groups, give them by hand with split.groups, raise the fraction, or set the side's fraction to 0"
        if empty
        else "every side has its rows"
    )
    by_side = [{"side": name, "rows": s.rows, "groups": len(s.groups)} for name, s in outcome.held.items()]
    return Check("sides_not_empty", not empty, told, {"sides": table(by_side)})


def _leakage_check(config: SplitConfig, outcome: Outcome) -> Check:
    near, leakage = config.near_duplicates, outcome.leakage
    if near is None or leakage is None:
        return Check(
            "near_duplicate_leakage",
            True,
            "the search for near-duplicates is switched off (near_duplicates: null)",
        )
    drops = near.action == "drop_from_train"
    bound = near.max_leakage if near.max_leakage is not None else (0.0 if drops else 1.0)
    shown: dict[str, Evidence] = {
        "leakage": number(leakage),
        "bound": number(bound),
        "dropped": number(outcome.rejects),
        "found": number(outcome.near_duplicates),
    }
    if outcome.worst_pairs:
        shown["worst_pairs"] = table(outcome.worst_pairs)
    done = (
        f"{outcome.rejects:,} rows were dropped"
        if drops
        else f"{outcome.near_duplicates:,} rows straddle and were only reported"
    )
    return Check(
        "near_duplicate_leakage",
        leakage <= bound,
        f"{leakage:.2%} of the held-out rows have a near-duplicate (similarity {near.threshold:g} or more) left on another side, at most {bound:.2%} may; {done}",
        shown,
    )


def evidence(out: Path, outcome: Outcome, painter: Painter) -> dict[str, Evidence]:
    """Tables and plots; the plots are written under out/plots/."""
    handed, counts = outcome.handed, outcome.counts
    painter.draw(
        charts.bars,
        out / "plots" / "sides.png",
        SIDES,
        {"rows": [counts[name] for name in SIDES], "groups": [counts[f"{name}_groups"] for name in SIDES]},
        title="Rows and groups per side",
        y="number",
    )
    painter.draw(
        charts.histogram,
        out / "plots" / "lengths.png",
        {n: s.lengths for n, s in handed.items() if s.rows},
        title="Characters per row",
        x="characters",
    )
    sides = []
    for name, summary in handed.items():
        data = summary.to_json(counts[f"{name}_groups"])
        characters = data["characters"] or {"mean": 0, "median": 0, "p95": 0, "max": 0}
        sides.append(
            {
                "side": name,
                "rows": data["rows"],
                "groups": data["groups"],
                "replies": data["turns"],
                **{f"characters {k}": v for k, v in characters.items()},
            }
        )
    return {
        "row_count": number(sum(counts[name] for name in SIDES)),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
        "sides": table(sides),
        **{f"{name}_rows": number(counts[name]) for name in SIDES},
        "near_duplicates_dropped": number(outcome.rejects),
        "near_duplicates": table(outcome.worst_pairs),
        "rows_and_groups": plot("plots/sides.png"),
        "lengths": plot("plots/lengths.png"),
    }

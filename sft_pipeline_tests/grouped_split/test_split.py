"""Sides by group: the worked example, stability under growth, fixed groups, time, checks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.split import SIDES, TEST, TRAIN, VALIDATION, Sides, fraction_of
from sft_pipeline_tests.dataset_runs import check, dataset, project, rows, run, write_jsonl

__all__ = ["project"]


def case(group: str, turn: int = 0) -> dict[str, Any]:
    return {
        "prompt": f"case {group}, turn {turn}: who may read {fraction_of('x', f'{group}{turn}')}?",
        "completion": f"the owner of {group}",
        "group": group,
    }


def sides_of(artifact: Any) -> dict[str, set[str]]:
    return {side: {r["group"] for r in rows(artifact, side)} for side in SIDES}


def test_worked_example_cases_t102_r550_p771_with_eval_group_r550(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [case("T102", 1), case("R550"), case("T102", 2), case("P771")])
    config = dataset(path, split={"validation": 0, "test": 0, "groups": {"test": ["R550"]}})
    outcome = run(config, project / "home")["grouped_split"]
    built = outcome.artifact
    assert sides_of(built) == {"train": {"P771", "T102"}, "validation": set(), "test": {"R550"}}
    assert [(r["group"], r["line"]) for r in rows(built, "train")] == [("T102", 1), ("T102", 3), ("P771", 4)]
    assert built.manifest.counts == {
        **built.manifest.counts,
        "read": 4,
        "train": 3,
        "test": 1,
        "rejects": 0,
        "train_groups": 2,
        "test_groups": 1,
    }
    assert check(outcome, "group_overlap") == {
        "name": "group_overlap",
        "blocking": True,
        "passed": True,
        "description": "0 groups are on two sides",
    }
    assert built.manifest.accepted
    summary = json.loads(built.file("split.json").read_text())
    assert (
        summary["sides"]["train"]["groups"] == 2
        and summary["salt"] == "salt-v1"
        and summary["group_overlap"] == 0
    )


def test_the_side_of_a_group_never_changes_between_versions() -> None:
    config = SplitConfig()
    sides = Sides(config)
    assert [round(fraction_of("salt-v1", g), 6) for g in ("T102", "R550", "P771")] == GOLDEN_FRACTIONS
    assert Counter(SIDES[sides.of(str(g))] for g in range(10_000)) == GOLDEN_COUNTS


GOLDEN_FRACTIONS = [0.821928, 0.596671, 0.981819]
GOLDEN_COUNTS = {"validation": 1018, "train": 7987, "test": 995}


def test_a_dataset_grown_ten_times_moves_no_group(project: Path) -> None:
    small = [case(f"g{i // 2}", i) for i in range(80)]
    split = {"validation": 0.2, "test": 0.2}
    before = sides_of(
        run(dataset(write_jsonl(project / "a.jsonl", small), split=split), project / "home")[
            "grouped_split"
        ].artifact
    )
    grown = [case(f"new{i // 2}", i) for i in range(720)] + small[::-1]
    after = sides_of(
        run(dataset(write_jsonl(project / "b.jsonl", grown), split=split), project / "home")[
            "grouped_split"
        ].artifact
    )
    assert all(before[side] for side in SIDES)
    assert all(before[side] <= after[side] for side in SIDES)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.text(min_size=1), min_size=1, max_size=40),
    more=st.lists(st.text(min_size=1), max_size=40),
    salt=st.text(),
)
def test_the_side_depends_on_salt_and_group_alone(groups: list[str], more: list[str], salt: str) -> None:
    config = SplitConfig(salt=salt, validation=0.3, test=0.3)
    alone = {g: Sides(config).of(g) for g in groups}
    together = Sides(config)
    for group in more + groups:
        together.of(group)
    assert {g: together.of(g) for g in groups} == alone


def test_growing_the_test_fraction_moves_no_group_out_of_test() -> None:
    small, large = Sides(SplitConfig(test=0.1)), Sides(SplitConfig(test=0.2))
    assert all(large.of(str(g)) == TEST for g in range(2_000) if small.of(str(g)) == TEST)


def test_groups_at_or_after_the_time_cutoff_are_test(project: Path) -> None:
    def at(group: str, time: str) -> dict[str, Any]:
        return {**case(group, len(time) + int(time[-2:])), "at": time}

    data = [
        at("old", "2026-05-01"),
        at("old", "2026-06-30"),
        at("edge", "2026-06-01"),
        at("new", "2026-06-15"),
        at("fixed", "2026-06-20"),
    ]
    split = {
        "validation": 0,
        "test": 0,
        "time_column": "at",
        "time_cutoff": "2026-06-01",
        "groups": {"train": ["fixed"]},
    }
    built = run(dataset(write_jsonl(project / "rows.jsonl", data), split=split), project / "home")[
        "grouped_split"
    ].artifact
    assert sides_of(built) == {"train": {"old", "fixed"}, "validation": set(), "test": {"edge", "new"}}


def test_an_empty_side_blocks_unless_its_size_is_zero(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [case("only")])
    outcome = run(dataset(path, split={"groups": {"train": ["only"]}}), project / "home")["grouped_split"]
    assert not outcome.artifact.manifest.accepted
    assert check(outcome, "sides_not_empty")["description"].startswith(
        "no rows in validation, test. Add groups"
    )
    outcome = run(
        dataset(path, split={"validation": 0, "test": 0, "groups": {"train": ["gone"]}}), project / "home"
    )["grouped_split"]
    assert outcome.artifact.manifest.accepted
    assert check(outcome, "fixed_groups_found") == {
        "name": "fixed_groups_found", "blocking": False, "passed": False, "description": "1 groups of split.groups are not in the data: gone",
    }  # fmt: skip


def test_contradictions_in_the_configuration_are_errors() -> None:
    for split, message in (
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"groups": {"train": ["a"], "test": ["a"]}}, "'a' is put on two sides"),
        ({"time_cutoff": "2026-01-01"}, "needs time_column"),
        ({"time_cutoff": "soon", "time_column": "at"}, "no ISO date"),
    ):
        with pytest.raises(ValidationError, match=message):
            SplitConfig.model_validate(split)


def test_sides_are_indexed_in_their_order() -> None:
    assert (SIDES[TRAIN], SIDES[VALIDATION], SIDES[TEST]) == ("train", "validation", "test")

"""Splits by group: the worked example, stability under growth, fixed groups, time, checks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.grouped_split import shingles
from sft_pipeline.stages.grouped_split.build import build
from sft_pipeline.stages.grouped_split.checks import SplitSummary, read_back
from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.grouped_split.split import TEST, TRAIN, VALIDATION, SplitAssignment, fractions_of
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.validated_rows.asset import STAGE as VALIDATED_ROWS
from sft_pipeline.store import Artifact
from sft_pipeline.store.manifest import data_version, list_files
from sft_pipeline.tables import parquet
from sft_pipeline.tables.schemas import SPLITS
from sft_pipeline_tests.dataset_runs import check, dataset, project, rows, run, write_jsonl

__all__ = ["project"]


def case(group: str, turn: int = 0) -> dict[str, Any]:
    return {
        "prompt": f"case {group}, turn {turn}: who may read {fractions_of('x', [f'{group}{turn}'])[0]}?",
        "completion": f"the owner of {group}",
        "group": group,
    }


def groups_by_split(artifact: Any) -> dict[str, set[str]]:
    return {split: {r["group"] for r in rows(artifact, split)} for split in SPLITS}


def test_worked_example_cases_t102_r550_p771_with_eval_group_r550(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [case("T102", 1), case("R550"), case("T102", 2), case("P771")])
    config = dataset(path, split={"validation": 0, "test": 0, "groups": {"test": ["R550"]}})
    outcome = run(config, project / "home")["grouped_split"]
    built = outcome.artifact
    assert groups_by_split(built) == {"train": {"P771", "T102"}, "validation": set(), "test": {"R550"}}
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
        "description": "0 groups are in two splits",
    }
    assert built.manifest.accepted
    summary = json.loads(built.file("split.json").read_text())
    assert (
        summary["sides"]["train"]["groups"] == 2
        and summary["salt"] == "salt-v1"
        and summary["group_overlap"] == 0
    )


def test_the_split_of_a_group_never_changes_between_versions() -> None:
    config = SplitConfig()
    assignment = SplitAssignment(config)
    assert fractions_of("salt-v1", ["T102", "R550", "P771"]).round(6).tolist() == GOLDEN_FRACTIONS
    assert Counter(SPLITS[i] for i in assignment.of([str(g) for g in range(10_000)])) == GOLDEN_COUNTS


GOLDEN_FRACTIONS = [0.821928, 0.596671, 0.981819]
GOLDEN_COUNTS = {"validation": 1018, "train": 7987, "test": 995}


def test_a_dataset_grown_ten_times_moves_no_group(project: Path) -> None:
    small = [case(f"g{i // 2}", i) for i in range(80)]
    split = {"validation": 0.2, "test": 0.2}
    before = groups_by_split(
        run(dataset(write_jsonl(project / "a.jsonl", small), split=split), project / "home")[
            "grouped_split"
        ].artifact
    )
    grown = [case(f"new{i // 2}", i) for i in range(720)] + small[::-1]
    after = groups_by_split(
        run(dataset(write_jsonl(project / "b.jsonl", grown), split=split), project / "home")[
            "grouped_split"
        ].artifact
    )
    assert all(before[split] for split in SPLITS)
    assert all(before[split] <= after[split] for split in SPLITS)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.text(min_size=1), min_size=1, max_size=40),
    more=st.lists(st.text(min_size=1), max_size=40),
    salt=st.text(),
)
def test_the_split_depends_on_salt_and_group_alone(groups: list[str], more: list[str], salt: str) -> None:
    config = SplitConfig(salt=salt, validation=0.3, test=0.3)
    alone = [int(SplitAssignment(config).of([g])[0]) for g in groups]
    assert SplitAssignment(config).of(more + groups)[len(more) :].tolist() == alone


def test_growing_the_test_fraction_moves_no_group_out_of_test() -> None:
    groups = [str(g) for g in range(2_000)]
    small, large = (SplitAssignment(SplitConfig(test=test)).of(groups) for test in (0.1, 0.2))
    assert (large[small == TEST] == TEST).all() and (small == TEST).any()


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
    assert groups_by_split(built) == {"train": {"old", "fixed"}, "validation": set(), "test": {"edge", "new"}}


def built_alone(folder: Path, validated: Artifact, **split: Any) -> tuple[Built, Path]:
    """The stage's build function alone, in a folder of its own."""
    out = folder / "out"
    out.mkdir(parents=True)
    config = SplitConfig.model_validate(split)
    built = build(
        Build(
            config=config,
            inputs={"validated_rows": validated},
            out=out,
            work=folder / "work",
            report=Reporter(),
        )
    )
    assert not list((folder / "work").glob("*"))
    return built, out


def copies() -> list[dict[str, Any]]:
    """Forty groups of which every fourth says nearly the same."""
    said = "please rotate the stale deploy key of the billing service before the audit on friday"
    return [
        {"group": f"g{i}", "prompt": f"{said} {i}", "completion": "done"} if i % 4 == 0 else case(f"g{i}")
        for i in range(40)
    ]


def test_built_twice_with_other_threads_in_another_folder_the_bytes_are_the_same(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(project / "rows.jsonl", copies())
    validated = run(dataset(path), project / "home", until=VALIDATED_ROWS)["validated_rows"].artifact
    versions = []
    for threads in (1, 4):
        monkeypatch.setattr(shingles, "THREADS", threads)
        split = {"validation": 0.2, "test": 0.2, "near_duplicates": {"threshold": 0.6}}
        built, out = built_alone(tmp_path / str(threads), validated, **split)
        assert built.counts["rejects"] > 0
        versions.append(data_version(list_files(out, built.volatile)))
    assert versions[0] == versions[1]


def test_the_worst_pairs_are_in_the_evidence_with_both_texts(project: Path, tmp_path: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", copies())
    validated = run(dataset(path), project / "home", until=VALIDATED_ROWS)["validated_rows"].artifact
    built, _ = built_alone(tmp_path, validated, groups={"test": ["g0"]}, near_duplicates={"threshold": 0.6})
    [leakage] = [c for c in built.checks if c.name == "near_duplicate_leakage"]
    for pairs in (leakage.evidence["worst_pairs"].value, built.evidence["near_duplicates"].value):
        assert len(pairs) == min(10, built.counts["near_duplicates"])
        assert [p["similarity"] for p in pairs] == sorted((p["similarity"] for p in pairs), reverse=True)
        for pair in pairs:
            assert pair["text"].startswith("please rotate") and pair["of_text"].startswith("please rotate")
            assert pair["side"] != pair["of_side"] and pair["group"] != pair["of_group"]


def test_files_that_hold_other_rows_than_were_assigned_are_found(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [case(f"g{i}") for i in range(30)])
    artifact = run(dataset(path), project / "home")["grouped_split"].artifact
    written = SplitSummary()
    for batch in parquet.read_batches(artifact.parts("train"), batch_rows=4):
        written.add(batch)
    on_disk = read_back(artifact.parts("train"))
    assert on_disk.row_ids == written.row_ids and on_disk.rows == written.rows > 1
    table = pa.concat_tables([pq.read_table(p) for p in artifact.parts("train")])
    moved = project / "moved.parquet"
    pq.write_table(table.take([1, 0, *range(2, table.num_rows)]), moved)
    assert read_back([moved]).row_ids != written.row_ids


def test_an_empty_split_blocks_unless_its_size_is_zero(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", [case("only")])
    outcome = run(dataset(path, split={"groups": {"train": ["only"]}}), project / "home")["grouped_split"]
    assert not outcome.artifact.manifest.accepted
    assert check(outcome, "splits_not_empty")["description"].startswith(
        "no rows in validation, test. Add groups"
    )
    outcome = run(
        dataset(path, split={"validation": 0, "test": 0, "groups": {"train": ["gone"]}}), project / "home"
    )["grouped_split"]
    assert outcome.artifact.manifest.accepted
    assert check(outcome, "fixed_groups_found") == {
        "name": "fixed_groups_found",
        "blocking": False,
        "passed": False,
        "description": "1 groups of split.groups are not in the data: gone",
    }


def test_contradictions_in_the_configuration_are_errors() -> None:
    for split, message in (
        ({"validation": 0.5, "test": 0.5}, "leave nothing to train on"),
        ({"groups": {"train": ["a"], "test": ["a"]}}, "'a' is put into two splits"),
        ({"time_cutoff": "2026-01-01"}, "needs time_column"),
        ({"time_cutoff": "soon", "time_column": "at"}, "no ISO date"),
    ):
        with pytest.raises(ValidationError, match=message):
            SplitConfig.model_validate(split)


def test_splits_are_indexed_in_their_order() -> None:
    assert (SPLITS[TRAIN], SPLITS[VALIDATION], SPLITS[TEST]) == ("train", "validation", "test")

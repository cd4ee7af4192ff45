"""What a stage says of itself when it was built."""

from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.stages.summary import summarize
from sft_pipeline_tests.dataset_runs import dataset, project, run, write_jsonl

__all__ = ["project"]


def lines(rows: list[dict[str, Any]], project: Path, **options: Any) -> dict[str, list[tuple[str, str]]]:
    path = write_jsonl(project / "rows.jsonl", rows)
    built = run(dataset({"path": str(path), **options}, contract={"max_reject_rate": 0.9}), project / "home")
    return {name: list(summarize(outcome.artifact)) for name, outcome in built.items()}


def test_counts_with_their_reasons_and_where_to_look(project: Path) -> None:
    rows = [{"prompt": f"question number {i} of many", "completion": f"answer {i}"} for i in range(60)]
    rows += [{"prompt": "a", "completion": ""}, {"prompt": "b"}, {"prompt": "c", "completion": ""}]
    said = lines(rows, project)
    assert said["raw_rows"] == [("raw_rows: 63 rows from 1 file", "info")]
    [(text, level)] = said["validated_rows"]
    expected = (
        "validated_rows: 60 of 63 rows; 3 rejected: empty_completion 2, missing_field 1 (completion). See "
    )
    assert text.startswith(expected) and level == "warning"
    assert Path(text.removeprefix(expected)).is_file()
    assert said["grouped_split"][0][0].startswith("grouped_split: ")


def test_rows_that_were_not_selected_are_no_rejects(project: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}", "n": i} for i in range(60)]
    said = lines(rows, project, where="n >= 20")
    assert said["validated_rows"] == [("validated_rows: 40 of 40 rows, 20 more not selected", "info")]


@pytest.mark.parametrize("alike", [True, False])
def test_near_duplicates_that_were_dropped_are_told(project: Path, alike: bool) -> None:
    words = " ".join(f"word{i}" for i in range(40))
    rows = [
        {"prompt": f"{words} {i}" if alike else " ".join(f"{w}{i}" for w in words.split()), "completion": "x"}
        for i in range(80)
    ]
    said = lines(rows, project)["grouped_split"]
    assert ("dropped as near-duplicates" in said[0][0]) is alike
    assert any(level == "warning" and "train_rows_kept" in text for text, level in said) is alike

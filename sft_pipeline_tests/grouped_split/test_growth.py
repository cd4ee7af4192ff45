"""Ten snapshots that grow: no group moves, and no near-duplicates cross splits."""

import random
from itertools import combinations, product
from pathlib import Path
from typing import Any

from sft_pipeline.tables.schemas import SPLITS
from sft_pipeline_tests.dataset_runs import check, dataset, project, rows, run, write_jsonl

__all__ = ["project"]

THRESHOLD = 0.7


def grown(seed: int = 0) -> list[list[dict[str, Any]]]:
    """Snapshots of 12, 24, ... 120 rows: new groups, new turns of old groups, near-copies across groups."""
    rng = random.Random(seed)
    words = [f"word{i}" for i in range(400)]
    data: list[dict[str, Any]] = []
    snapshots = []
    for snapshot in range(10):
        for i in range(12):
            prompt, completion = " ".join(rng.sample(words, 30)), rng.choice(words)
            if data and rng.random() < 0.3:
                copied = rng.choice(data)
                said, completion = copied["prompt"].split(), copied["completion"]
                said[rng.randrange(len(said))] = rng.choice(words)
                prompt = " ".join(said)
            old = bool(data) and rng.random() < 0.3
            group = rng.choice(data)["tenant"] if old else f"tenant {snapshot}.{i}"
            data.append({"prompt": prompt, "completion": completion, "tenant": group})
        rng.shuffle(data)
        snapshots.append([dict(row) for row in data])
    return snapshots


def grams(row: dict[str, Any]) -> set[tuple[str, ...]]:
    words = " ".join(m["content"] for m in row["messages"]).split()
    return set(zip(words, words[1:], words[2:]))


def test_no_group_moves_and_no_near_duplicates_cross_splits_while_a_dataset_grows_tenfold(
    project: Path,
) -> None:
    config = {
        "validation": 0.2,
        "test": 0.25,
        "groups": {"test": ["tenant 3.3"], "train": ["tenant 0.0"]},
        "near_duplicates": {"threshold": THRESHOLD},
    }
    split_of: dict[str, str] = {}
    dropped = 0
    for number, data in enumerate(grown()):
        source = {
            "path": str(write_jsonl(project / f"snapshot-{number}.jsonl", data)),
            "columns": {"group": "tenant"},
        }
        outcome = run(dataset(source, split=config), project / "home")["grouped_split"]
        built = outcome.artifact
        splits = {split: rows(built, split) for split in SPLITS}
        rejects = rows(built, "rejects.parquet")
        assert sum(map(len, splits.values())) + len(rejects) == len(data)
        for split, found in splits.items():
            for group in {row["group"] for row in found}:
                assert split_of.setdefault(group, split) == split
        assert split_of.get("tenant 3.3", "test") == "test"
        assert split_of.get("tenant 0.0", "train") == "train"
        said = {split: [grams(row) for row in found] for split, found in splits.items()}
        for one, other in combinations(SPLITS, 2):
            assert all(len(x & y) < THRESHOLD * len(x | y) for x, y in product(said[one], said[other]))
        assert (
            check(outcome, "group_overlap")["passed"] and check(outcome, "near_duplicate_leakage")["passed"]
        )
        dropped += len(rejects)
    assert dropped > 10 and set(split_of.values()) == set(SPLITS)

"""The data plane over snapshots: its cost follows what changed, and its bytes depend on the rows alone."""

import json
import random
from pathlib import Path

import pytest

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages import workers
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run, StageOutcome, run_until
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.tokenized_rows import build as tokenizing
from sft_pipeline.store import Store
from sft_pipeline.tables.parquet import read_batches

WORDS = [
    "who",
    "may",
    "read",
    "the",
    "report",
    "of",
    "team",
    "access",
    "request",
    "grant",
    "deny",
    "owner",
    "key",
    "rotate",
    "today",
    "never",
]
DATA_STAGES = ["raw_rows", "validated_rows", "grouped_split", "tokenized_rows", "packed_shards"]


def rows_of(seed: int, count: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=12)) + f" {seed}-{i}?",
            "completion": " ".join(rng.choices(WORDS, k=20)),
            "group": f"g{rng.randrange(count)}",
        }
        for i in range(count)
    ]


def write(folder: Path, snapshot: str, rows: list[dict[str, str]], files: int = 1) -> None:
    (folder / snapshot).mkdir(parents=True)
    for i in range(files):
        lines = [json.dumps(r) for r in rows[i::files]]
        (folder / snapshot / f"rows-{i}.jsonl").write_text("\n".join(lines) + "\n")


def run(folder: Path, snapshot: str, store: Path, **tokens) -> dict[str, StageOutcome]:
    dataset = DatasetConfig(name="words", sources=[{"path": str(folder), "format": "prompt_completion"}])
    recipe = RecipeConfig(
        name="words_recipe",
        dataset="words",
        model={"base": "data/base_model"},
        tokens={"max_length": 512, **tokens},
    )
    branch = Branch(dataset, snapshot, recipe)
    return run_until("packed_shards", STAGES, branch, Run(Store(store), Reporter()))


def versions(outcomes: dict[str, StageOutcome]) -> dict[str, str]:
    return {name: outcomes[name].artifact.manifest.data_version for name in DATA_STAGES}


def test_a_changed_snapshot_tokenizes_the_changed_rows_and_equals_a_cold_build(tmp_path, home):
    source = tmp_path / "source"
    before = rows_of(1, 200)
    after = [*before[:150], *rows_of(2, 5), *before[155:]]
    write(source, "2026-01-01", before, files=2)
    write(source, "2026-02-01", after[::-1], files=3)
    run(source, "2026-01-01", tmp_path / "store")
    warm = run(source, "2026-02-01", tmp_path / "store")
    cold = run(source, "2026-02-01", tmp_path / "other")
    counts = warm["tokenized_rows"].artifact.manifest.counts
    assert counts["rows_tokenized"] == 5 and counts["rows_reused"] == 195
    assert versions(warm) == versions(cold)
    skew = next(c for c in warm["tokenized_rows"].artifact.manifest.checks if c["name"] == "tokenizer_skew")
    assert skew["passed"] and "earlier build" in skew["description"]


def test_another_mask_or_length_takes_nothing_over(tmp_path, home):
    source = tmp_path / "source"
    write(source, "2026-01-01", rows_of(1, 60))
    run(source, "2026-01-01", tmp_path / "store")
    for tokens in ({"supervise": "all"}, {"max_length": 500}):
        counts = run(source, "2026-01-01", tmp_path / "store", **tokens)[
            "tokenized_rows"
        ].artifact.manifest.counts
        assert counts["rows_reused"] == 0 and counts["rows_tokenized"] > 0


@pytest.mark.parametrize(
    ("count", "compared"),
    [
        pytest.param(1, 20, id="one thread"),
        pytest.param(3, 20, id="three threads, by columns"),
        pytest.param(3, 2000, id="three processes, row by row"),
    ],
)
def test_the_number_of_workers_changes_no_byte(tmp_path, home, monkeypatch, count, compared):
    source = tmp_path / "source"
    write(source, "2026-01-01", rows_of(3, 300))
    there = versions(run(source, "2026-01-01", tmp_path / "there"))

    def read_few(paths, columns=None, batch_rows=None):
        return read_batches(paths, columns, batch_rows=32)  # BATCH itself is also the size of a row group

    monkeypatch.setattr(tokenizing, "read_batches", read_few)
    monkeypatch.setattr(tokenizing, "COMPARED", compared)
    monkeypatch.setattr(tokenizing, "WORTH_PROCESSES", 64)
    monkeypatch.setattr(workers, "INLINE_ITEMS", 1)
    monkeypatch.setenv("SFT_WORKERS", str(count))
    assert versions(run(source, "2026-01-01", tmp_path / "here")) == there

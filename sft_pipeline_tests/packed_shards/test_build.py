"""Blocks on disk: every row once, boundaries kept, the same bytes twice."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.packed_shards import blocks
from sft_pipeline.stages.packed_shards.asset import STAGE
from sft_pipeline.stages.packed_shards.blocks import BLOCKS, position_ids
from sft_pipeline.stages.packed_shards.build import build
from sft_pipeline.stages.packed_shards.config import PackedShardsConfig, PackingConfig
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.store import Artifact
from sft_pipeline.store.manifest import data_version, list_files
from sft_pipeline.tables.parquet import PartWriter, read_rows
from sft_pipeline.tables.schemas import IGNORE_LABEL, TOKENIZED
from sft_pipeline.training.shards import Plan, Shards


class Example(NamedTuple):
    row_id: str
    input_ids: np.ndarray
    labels: np.ndarray
    weights: list[float] | None = None


def examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        length = int(rng.integers(4, 60))
        ids = rng.integers(0, 1000, length).astype(np.int32)
        prompt = int(rng.integers(1, length - 1))
        labels = np.where(np.arange(length) >= prompt, ids, IGNORE_LABEL).astype(np.int32)
        out.append(Example(f"{i:032x}", ids, labels))
    return out


def tokenized(folder: Path, train: list[Example], validation: list[Example] = ()) -> Artifact:
    for split, rows in (("train", train), ("validation", validation), ("test", ())):
        with PartWriter(folder / split, TOKENIZED, rows_per_part=64, row_group=16) as out:
            out.append(
                [
                    {
                        "row_id": row.row_id,
                        "input_ids": row.input_ids.tolist(),
                        "labels": row.labels.tolist(),
                        "weights": row.weights,
                        "length": len(row.input_ids),
                    }
                    for row in rows
                ]
            )
    return Artifact(folder)


def run(
    tmp_path: Path, source: Artifact, name: str = "out", strategy: str = "bfd", **config
) -> tuple[Built, Path]:
    out = tmp_path / name
    out.mkdir()
    settings = {
        "packing": PackingConfig(strategy=strategy),
        "max_length": 128,
        "blocks_per_update": 8,
        "epochs": 2,
        "seed": 7,
        **config,
    }
    work = tmp_path / "work"
    built = build(
        Build(
            config=PackedShardsConfig(**settings),
            inputs={"tokenized_rows": source},
            out=out,
            work=work,
            report=Reporter(),
            asset="r/packed_shards",
        )
    )
    assert not work.exists()
    return built, out


@pytest.mark.parametrize("strategy", ["bfd", "none"])
def test_every_accepted_row_is_exactly_once_in_the_packs_whole_and_with_its_boundaries(tmp_path, strategy):
    train, validation = examples(300), examples(20, seed=1)
    built, out = run(tmp_path, tokenized(tmp_path / "in", train, validation), strategy=strategy)
    assert all(c.passed for c in built.checks), [c.description for c in built.checks]
    assert sorted(c.name for c in built.checks) == sorted(c.name for c in STAGE.checks)
    for split, given in (("train", train), ("validation", validation)):
        parts = sorted((out / split).glob("*.parquet"))
        assert pq.read_schema(parts[0]).equals(BLOCKS)
        by_id = {e.row_id: e for e in given}
        seen = []
        for i, block in enumerate(read_rows(parts)):
            assert block["block"] == i and len(block["input_ids"]) == sum(block["seq_lengths"]) <= 128
            start = 0
            for row_id, length in zip(block["row_ids"], block["seq_lengths"], strict=True):
                piece = slice(start, start + length)
                assert block["input_ids"][piece] == by_id[row_id].input_ids.tolist()
                assert block["labels"][piece] == by_id[row_id].labels.tolist()
                assert block["position_ids"][piece] == list(range(length))
                seen.append(row_id)
                start += length
        assert sorted(seen) == sorted(by_id)
    plan = pq.read_table(out / "plan.parquet").to_pandas()
    assert (
        built.counts["updates"] == plan["update"].nunique()
        and (plan.groupby(["epoch", "block"]).size() == 1).all()
    )
    assert plan.groupby("epoch")["supervised"].sum().tolist() == [built.counts["supervised_tokens"]] * 2


def test_two_segments_of_three_restart_their_positions():
    assert position_ids(np.array([3, 3])).tolist() == [0, 1, 2, 0, 1, 2]


def test_built_twice_it_has_the_same_data_version_and_another_seed_moves_blocks(tmp_path):
    source = tokenized(tmp_path / "in", examples(120))
    versions = []
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        built, out = run(tmp_path, source, name, seed=seed)
        versions.append(data_version(list_files(out, built.volatile)))
    assert versions[0] == versions[1] != versions[2]


def test_the_bytes_depend_neither_on_threads_nor_on_how_much_is_kept_in_memory(tmp_path, monkeypatch):
    source = tokenized(tmp_path / "in", examples(400))
    versions = []
    before = pa.cpu_count()
    for name, threads, resident in (("one", 1, 0), ("two", 4, blocks.RESIDENT_BYTES)):
        pa.set_cpu_count(threads)
        monkeypatch.setattr(blocks, "RESIDENT_BYTES", resident)
        monkeypatch.setattr(blocks, "CHUNK_TOKENS", 1_000)
        built, out = run(tmp_path, source, name)
        versions.append(data_version(list_files(out, built.volatile)))
    pa.set_cpu_count(before)
    assert versions[0] == versions[1]


def test_training_reads_what_was_written_from_small_row_groups_in_several_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "GROUP_TOKENS", 256)
    monkeypatch.setattr(blocks, "GROUPS_PER_PART", 3)
    built, out = run(tmp_path, tokenized(tmp_path / "in", examples(300)))
    parts = sorted((out / "train").glob("*.parquet"))
    shards, plan = Shards(parts, cache_bytes=1), Plan(out / "plan.parquet")
    assert len(parts) > 5 and len(shards) == built.counts["blocks"] and len(plan) == built.counts["updates"]
    for expected in read_rows(parts):
        block = shards.block(expected["block"])
        assert block.input_ids.tolist() == expected["input_ids"]
        assert shards.row_ids(expected["block"]) == expected["row_ids"]
    planned = pq.read_table(out / "plan.parquet").to_pandas()
    for update, rows in planned.groupby("update"):
        assert plan.blocks(int(update) - 1).tolist() == rows["block"].tolist()
    assert plan.planned("tokens", len(plan)) == 2 * built.counts["tokens"]


@pytest.mark.parametrize("first", [0, 30], ids=["from the first row on", "after rows without"])
def test_weights_go_with_their_tokens_to_training(tmp_path, first):
    train = [
        e
        if i < first or i % 3 == 0
        else e._replace(weights=[0.0 if t == IGNORE_LABEL else (0.1, 2.5)[i % 2] for t in e.labels])
        for i, e in enumerate(examples(90))
    ]
    built, out = run(tmp_path, tokenized(tmp_path / "in", train))
    assert all(c.passed for c in built.checks), [c.description for c in built.checks]
    by_id = {e.row_id: e for e in train}
    shards = Shards(sorted((out / "train").glob("*.parquet")))
    per_block, plain = [], 0
    for number in range(len(shards)):
        block = shards.block(number)
        expected = np.concatenate(
            [
                (e.labels != IGNORE_LABEL).astype(np.float32) if e.weights is None else np.float32(e.weights)
                for e in map(by_id.get, shards.row_ids(number))
            ]
        )
        plain += block.weights is None
        found = (block.labels != IGNORE_LABEL).astype(np.float32) if block.weights is None else block.weights
        assert found.tolist() == expected.tolist()
        per_block.append(float(expected.sum(dtype=np.float64)))
    assert plain < len(shards)
    plan = pq.read_table(out / "plan.parquet").to_pandas()
    assert plan["weight"].tolist() == [per_block[b] for b in plan["block"]]
    budget = json.loads((out / "budget.json").read_text())
    assert budget["loss_weight_per_update"]["mean"] != budget["supervised_tokens_per_update"]["mean"]


@pytest.mark.parametrize("lost", ["moved by a token", "another row's", "left out"])
def test_weights_that_do_not_stay_with_their_tokens_fail_a_blocking_check(tmp_path, monkeypatch, lost):
    train = [
        e._replace(weights=[0.0 if t == IGNORE_LABEL else (0.1, 2.5)[i % 2] for t in e.labels])
        for i, e in enumerate(examples(60))
    ]
    own = blocks.weights_column

    def spoiled(weights, labels, starts):
        if lost == "moved by a token":
            weights = np.roll(weights, 1)
        elif lost == "another row's":  # every total over the split stays
            on = np.flatnonzero(weights)
            weights = weights.copy()
            weights[on] = weights[on[::-1]]
        return own(None if lost == "left out" else weights, labels, starts)

    monkeypatch.setattr(blocks, "weights_column", spoiled)
    built, _ = run(tmp_path, tokenized(tmp_path / "in", train))
    [check] = [c for c in built.checks if c.name == "labels_match_inputs"]
    assert not check.passed and "loss weights" in check.description


def test_no_training_rows_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        run(tmp_path, tokenized(tmp_path / "in", []))


def test_an_empty_validation_split_is_fine(tmp_path):
    built, out = run(tmp_path, tokenized(tmp_path / "in", examples(30)))
    assert built.counts["validation_blocks"] == 0 and all(c.passed for c in built.checks)
    assert pq.read_table(out / "validation").num_rows == 0


def test_a_label_that_is_not_its_input_fails_a_blocking_check(tmp_path):
    wrong = examples(30)
    wrong[3].labels[-1] = 5_000
    built, _ = run(tmp_path, tokenized(tmp_path / "in", wrong))
    assert not {c.name: c for c in built.checks}["labels_match_inputs"].passed

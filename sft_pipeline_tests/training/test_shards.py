"""Blocks and updates are found without reading what is not asked for; misnumbered ones are refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.stages.packed_shards.blocks import BLOCKS
from sft_pipeline.training import shards as shards_module
from sft_pipeline.training.shards import Plan, Shards


def write_part(folder, name, first, rows, row_group=2):
    path = folder / f"part-{name:05d}.parquet"
    columns = {f.name: [[number]] * rows for number in [first] for f in BLOCKS}
    columns["block"] = list(range(first, first + rows))
    columns["input_ids"] = [[n, n + 1] for n in columns["block"]]
    columns["labels"] = columns["position_ids"] = columns["input_ids"]
    columns["seq_lengths"] = [[2]] * rows
    columns["row_ids"] = [[str(n)] for n in columns["block"]]
    pq.write_table(pa.table(columns, schema=BLOCKS), path, row_group_size=row_group)
    return path


def write_plan(path, updates, row_group=5, **columns):
    position = [updates[:i].count(u) for i, u in enumerate(updates)]
    table = {
        "update": [u + 1 for u in updates],
        "position": position,
        "block": list(range(len(updates))),
        **columns,
    }
    pq.write_table(pa.table(table), path, row_group_size=row_group)
    return path


def test_the_first_block_opens_two_parts_however_many_there_are(tmp_path, monkeypatch):
    parts = [write_part(tmp_path, i, 3 * i, 3) for i in range(40)]
    opened = []
    real = pq.ParquetFile
    monkeypatch.setattr(
        shards_module.pq, "ParquetFile", lambda path, **rest: opened.append(path) or real(path, **rest)
    )
    shards = Shards(parts)
    assert len(shards) == 120 and len(opened) <= 2
    shards.block(0)
    assert len(opened) <= 9  # bisection
    assert [shards.block(n).input_ids[0] for n in range(120)] == list(range(120))


def test_parts_of_any_size_are_read_and_a_first_few_can_be_asked_for(tmp_path):
    sizes = [0, 3, 1, 0, 7, 2, 0]
    firsts = np.cumsum([0, *sizes])
    parts = [write_part(tmp_path, i, int(firsts[i]), n) for i, n in enumerate(sizes)]
    shards = Shards(parts, cache_bytes=1)
    assert len(shards) == 13 and [shards.row_ids(n) for n in range(13)] == [[str(n)] for n in range(13)]
    few = Shards(parts, most=4)
    assert len(few) == 4 and few.block(3).block == 3
    with pytest.raises(InputError, match="not among the 4"):
        few.block(4)
    assert len(Shards([])) == 0 and len(Shards(parts[:1])) == 0


@pytest.mark.parametrize("firsts", [[1, 4, 7], [0, 4, 7], [0, 3, 7], [0, 2, 5]])
def test_missing_and_doubled_block_numbers_are_errors(tmp_path, firsts):
    parts = [write_part(tmp_path, i, first, 3) for i, first in enumerate(firsts)]
    with pytest.raises(InputError, match="not numbered"):
        found = Shards(parts)
        for number in range(len(found)):
            found.block(number)


def test_a_row_group_with_other_numbers_than_its_place_says_is_an_error(tmp_path):
    path = write_part(tmp_path, 0, 0, 6)
    table = pq.read_table(path)
    mixed = table.take([0, 2, 1, 3, 4, 5])
    pq.write_table(mixed, path, row_group_size=6)
    with pytest.raises(InputError, match="not numbered"):
        Shards([path]).block(0)


def test_updates_are_found_over_row_groups(tmp_path):
    updates = [0] * 3 + [1] * 11 + [2] + [3] * 4
    plan = Plan(write_plan(tmp_path / "plan.parquet", updates, tokens=[10] * len(updates)))
    assert len(plan) == 4
    for update in (3, 1, 0, 2):
        assert plan.blocks(update).tolist() == [i for i, u in enumerate(updates) if u == update]
    assert [plan.planned("tokens", n) for n in range(5)] == [0, 30, 140, 150, 190]
    assert plan.planned("examples", 2) is None


@pytest.mark.parametrize("updates", [[1, 1, 2], [0, 0, 2], [0, 0, 0, 0, 0, 2], [0, 1, 0], []])
def test_updates_that_are_not_numbered_in_order_are_errors(tmp_path, updates):
    path = write_plan(tmp_path / "plan.parquet", updates)
    with pytest.raises(InputError, match="not numbered"):
        plan = Plan(path)
        for update in range(len(plan)):
            plan.blocks(update)


def test_blocks_that_are_not_in_the_order_of_training_are_an_error(tmp_path):
    path = write_plan(tmp_path / "plan.parquet", [0, 0, 0])
    table = pq.read_table(path)
    pq.write_table(table.take([0, 2, 1]), path)
    with pytest.raises(InputError, match="in order"):
        Plan(path).blocks(0)

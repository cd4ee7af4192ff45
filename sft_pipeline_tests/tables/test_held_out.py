"""Which held-out rows are generated, and how they are read."""

import hashlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_pipeline.tables.held_out import chosen_positions, held_out_rows


@pytest.fixture
def parts(tmp_path):
    """Two parts; the third row is the second part of a row that was split."""
    ids = ["a", "b", "b/1", "c", "d", "e"]
    rows = [
        {"row_id": r, "group": f"g{r}", "input_ids": [1, 2, i], "prompt_length": 2, "completion": r.upper()}
        for i, r in enumerate(ids)
    ]
    paths = [tmp_path / f"part-{i}.parquet" for i in range(2)]
    for path, piece in zip(paths, (rows[:4], rows[4:])):
        pq.write_table(pa.Table.from_pylist(piece), path)
    return paths


def test_all_rows_are_taken_in_order_without_further_parts(parts):
    assert chosen_positions(parts, None) == [0, 1, 3, 4, 5]


def test_a_sample_has_the_smallest_hashes_and_is_the_same_in_another_order(parts):
    smallest = sorted("abcde", key=lambda r: hashlib.sha256(r.encode()).digest())[:3]
    for order in (parts, parts[::-1]):
        rows = held_out_rows(order, chosen_positions(order, 3))
        assert sorted(r.row_id for r in rows) == sorted(smallest)


def test_rows_are_read_across_parts_as_prompt_and_target(parts):
    found = list(held_out_rows(parts, [1, 5]))
    assert [(r.position, r.row_id, r.group, r.completion) for r in found] == [
        (1, "b", "gb", "B"),
        (5, "e", "ge", "E"),
    ]
    assert [(r.prompt, r.target) for r in found] == [([1, 2], [1]), ([1, 2], [5])]
    assert list(held_out_rows(parts, [])) == []

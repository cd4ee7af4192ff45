"""Best-fit-decreasing on the histogram is exactly best-fit-decreasing."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.stages.packed_shards.packing import pack, plan_patterns


def exact_bfd(lengths: list[int], max_length: int) -> int:
    """Blocks of the textbook algorithm, example by example."""
    rooms: list[int] = []
    blocks = 0
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms.pop(at)
        else:
            room, blocks = max_length, blocks + 1
        insort(rooms, room - length)
    return blocks


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_never_more_blocks_than_exact_bfd_and_every_example_once(data):
    max_length = data.draw(st.integers(1, 60))
    lengths = np.array(data.draw(st.lists(st.integers(1, max_length), max_size=120)), dtype=np.int64)
    packing = pack(lengths, max_length, "bfd", seed=data.draw(st.integers(0, 3)))
    assert packing.blocks == exact_bfd(lengths.tolist(), max_length)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert (packing.sums(lengths) <= max_length).all() and packing.starts[-1] == len(lengths)


def test_the_field_example_fits_one_block():
    lengths = np.array([180, 95, 310, 150, 220, 60, 400, 130, 275, 200])
    assert pack(lengths, 2048, "bfd").blocks == 1


def test_strategy_none_keeps_one_example_per_block_in_order():
    packing = pack(np.array([3, 1, 2]), 4, "none")
    assert [packing.examples(b).tolist() for b in range(3)] == [[0], [1], [2]]


def test_realistic_lengths_are_packed_98_percent_full_and_deterministically():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.5, 20_000), 1, 1024).astype(np.int64)
    packing, again = pack(lengths, 2048, "bfd", seed=1), pack(lengths, 2048, "bfd", seed=1)
    assert packing.blocks > 1000 and lengths.sum() / (packing.blocks * 2048) >= 0.98
    assert (packing.order == again.order).all() and packing.blocks == exact_bfd(lengths.tolist(), 2048)
    assert (pack(lengths, 2048, "bfd", seed=2).order != packing.order).any()


def test_a_million_rows_are_planned_in_milliseconds():
    import time

    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.5, 1_000_000), 1, 2048).astype(np.int64)
    histogram = np.bincount(lengths, minlength=2049)
    start = time.perf_counter()
    patterns = plan_patterns(histogram, 2048)
    assert time.perf_counter() - start < 1
    assert sum(count * sum(n for _, n in pattern) for pattern, count in patterns) == 1_000_000


def test_an_example_longer_than_a_block_is_an_error():
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.array([5, 9]), 8, "bfd")

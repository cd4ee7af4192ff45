"""On the histogram it is exactly best-fit-decreasing, and a packing never takes more blocks than that."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.stages.packed_shards.packing import exact_fill, lower_bound, pack, plan_patterns


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
    planned = plan_patterns(np.bincount(lengths, minlength=max_length + 1), max_length)
    assert sum(count for _, count in planned) == exact_bfd(lengths.tolist(), max_length)
    assert packing.blocks <= exact_bfd(lengths.tolist(), max_length)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert (packing.sums(lengths) <= max_length).all() and packing.starts[-1] == len(lengths)


def test_the_field_example_fits_one_block():
    lengths = np.array([180, 95, 310, 150, 220, 60, 400, 130, 275, 200])
    assert pack(lengths, 2048, "bfd").blocks == 1


def test_strategy_none_keeps_one_example_per_block_in_order():
    packing = pack(np.array([3, 1, 2]), 4, "none")
    assert packing.order.tolist() == [0, 1, 2] and packing.starts.tolist() == [0, 1, 2, 3]


def log_normal(rows: int, sigma: float, longest: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(5.2, sigma, rows), 1, longest).astype(np.int64)


def narrow(rows: int, longest: int, seed: int = 0) -> np.ndarray:
    """Like GSM8K: much the same length, few short ones, so best-fit-decreasing cannot fill its blocks."""
    lengths = np.random.default_rng(seed).normal(190, 55, rows)
    return np.clip(lengths, 70, longest).astype(np.int64)


def bimodal(rows: int, longest: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    short, long = rng.normal(longest / 8, longest / 50, rows), rng.normal(longest / 2, longest / 20, rows)
    return np.clip(np.where(rng.random(rows) < 0.7, short, long), 1, longest).astype(np.int64)


@pytest.mark.parametrize("max_length", [1024, 2048])
@pytest.mark.parametrize(
    "lengths",
    [
        lambda half: log_normal(60_000, 0.5, half),
        lambda half: log_normal(60_000, 1.0, half),
        lambda half: log_normal(60_000, 1.2, half),
        lambda half: narrow(60_000, half),
        lambda half: bimodal(60_000, half),
    ],
)
def test_a_thousand_blocks_of_examples_of_half_a_block_at_most_are_98_percent_full(lengths, max_length):
    rows = lengths(max_length // 2)
    packing = pack(rows, max_length, "bfd")
    assert packing.blocks >= 1000 and rows.sum() / (packing.blocks * max_length) >= 0.98
    assert packing.blocks <= exact_bfd(rows.tolist(), max_length)


@pytest.mark.parametrize("max_length", [512, 768, 1024])
def test_blocks_are_filled_exactly_where_best_fit_decreasing_leaves_room(max_length):
    rows = narrow(30_000, max_length)
    histogram = np.bincount(rows, minlength=max_length + 1)
    decreasing = exact_bfd(rows.tolist(), max_length)
    bound = lower_bound(histogram, max_length)
    assert decreasing > 1.01 * bound and pack(rows, max_length, "bfd").blocks < 1.005 * bound


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_exact_fill_holds_every_example_once_and_has_fewer_blocks_than_asked(data):
    max_length = data.draw(st.integers(1, 60))
    lengths = np.array(data.draw(st.lists(st.integers(1, max_length), min_size=1, max_size=200)))
    histogram = np.bincount(lengths, minlength=max_length + 1)
    most = data.draw(st.integers(1, len(lengths) + 1))
    plan = exact_fill(histogram, max_length, most)
    if plan is None:
        return
    held = np.zeros_like(histogram)
    for pattern, count in plan:
        assert count > 0 and sum(length * each for length, each in pattern) <= max_length
        for length, each in pattern:
            held[length] += each * count
    assert (held == histogram).all()
    assert lower_bound(histogram, max_length) <= sum(count for _, count in plan) < most


def test_the_plan_is_the_same_every_time_and_another_seed_changes_members_but_no_fill():
    lengths = narrow(20_000, 512)
    one, again, other = (pack(lengths, 1024, "bfd", seed=seed) for seed in (1, 1, 2))
    assert (one.order == again.order).all() and (one.starts == again.starts).all()
    assert (one.order != other.order).any() and (one.sums(lengths) == other.sums(lengths)).all()


def test_never_more_blocks_than_trl():
    datasets = pytest.importorskip("datasets")
    from trl.data_utils import pack_dataset

    for max_length, lengths in (
        (256, narrow(1_500, 256, seed=1)),
        (512, log_normal(1_500, 0.5, 512, seed=2)),
        (1024, log_normal(1_500, 1.2, 1024, seed=3)),
        (1024, bimodal(1_500, 1024, seed=4)),
    ):
        rows = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths.tolist()]})
        theirs = pack_dataset(rows, seq_length=max_length, strategy="bfd")
        assert pack(lengths, max_length, "bfd").blocks <= len(theirs)


def test_a_million_rows_are_planned_on_their_histogram():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.5, 1_000_000), 1, 2048).astype(np.int64)
    histogram = np.bincount(lengths, minlength=2049)
    patterns = plan_patterns(histogram, 2048)
    assert sum(count * sum(n for _, n in pattern) for pattern, count in patterns) == 1_000_000


def test_an_example_longer_than_a_block_is_an_error():
    with pytest.raises(ValueError, match="do not fit"):
        pack(np.array([5, 9]), 8, "bfd")

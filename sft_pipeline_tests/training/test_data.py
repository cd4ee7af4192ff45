"""Shards, plan and layouts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.errors import InputError
from sft_pipeline.training.data import (
    Feed,
    all_blocks,
    layout_for,
    microbatches,
    prefetched,
    supervised_targets,
)
from sft_pipeline.training.shards import Block, Plan, Shards
from sft_pipeline_tests.training import tiny


@pytest.fixture
def packed(tmp_path):
    return tiny.packed_shards(tmp_path / "packed")


def test_blocks_are_read_back_by_number_whatever_part_they_are_in(packed):
    shards = Shards(packed.parts("train"), cache_bytes=1)
    expected = tiny.pack(tiny.examples(48), 64)
    for number in reversed(range(len(shards))):
        block = shards.block(number)
        assert block.input_ids.tolist() == expected[number]["input_ids"]
        assert block.labels.tolist() == expected[number]["labels"]
        assert shards.row_ids(number) == expected[number]["row_ids"]
    assert len(shards) == len(expected)
    with pytest.raises(InputError, match="not among the"):
        shards.block(len(expected))


def test_the_feed_follows_the_plan_and_starts_anywhere(packed):
    plan, shards = Plan(packed.file("plan.parquet")), Shards(packed.parts("train"))
    feed = Feed(shards, plan, "rows", per_device_batch=2, max_tokens=128, updates=len(plan))
    whole = list(feed.iterate(0))
    assert [u.update for u in whole] == list(range(len(plan)))
    assert [u.blocks for u in whole] == [tuple(plan.blocks(i).tolist()) for i in range(len(plan))]
    later = list(feed.iterate(3))
    assert [u.update for u in later] == list(range(3, len(plan)))
    assert torch.equal(
        later[0].microbatches[0].inputs["input_ids"], whole[3].microbatches[0].inputs["input_ids"]
    )


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_another_number_of_ranks_or_micro_batches_divides_the_same_updates(packed, world):
    plan, shards = Plan(packed.file("plan.parquet")), Shards(packed.parts("train"))
    for layout in ("packed", "rows", "flat"):
        for update in range(len(plan)):
            shares = [
                Feed(shards, plan, layout, 1 + world, 100, len(plan), rank, world).update(update)
                for rank in range(world)
            ]
            expected = [shards.block(int(b)) for b in plan.blocks(update)]
            assert sum(s.examples for s in shares) == sum(len(b.lengths) for b in expected)
            assert sum(s.tokens for s in shares) == sum(len(b.input_ids) for b in expected)
            assert sum(s.supervised for s in shares) == sum(int((b.labels != -100).sum()) for b in expected)
            assert all(s.blocks == tuple(plan.blocks(update).tolist()) for s in shares)


def _block(segments):
    ids = [t for s in segments for t in s[0]]
    labels = [t for s in segments for t in s[1]]
    positions = [p for s in segments for p in range(len(s[0]))]
    return Block(
        0, *(np.array(x, dtype=np.int32) for x in (ids, labels, positions, [len(s[0]) for s in segments]))
    )


segment = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(3, 90), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(segment, min_size=1, max_size=5), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 40),
)
def test_every_layout_scores_the_same_predictions_and_none_across_a_boundary(
    raw, per_device_batch, max_tokens
):
    blocks = [
        _block(
            [(ids, [t if s else -100 for t, s in zip(ids, flags, strict=True)]) for ids, flags in segments]
        )
        for segments in raw
    ]
    expected = sorted(
        (tuple(ids[: i + 1]), ids[i + 1])
        for segments in raw
        for ids, flags in segments
        for i in range(len(ids) - 1)
        if flags[i + 1]
    )
    for layout in ("packed", "flat", "rows"):
        found = []
        for m in microbatches(
            blocks, layout=layout, per_device_batch=per_device_batch, max_tokens=max_tokens
        ):
            ids = m.inputs["input_ids"]
            positions = m.inputs.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids)).reshape(-1)
            flat = ids.reshape(-1)
            for at, target in zip(m.index.tolist(), m.targets.tolist(), strict=True):
                seen = int(positions[at]) + 1
                found.append((tuple(flat[at - seen + 1 : at + 1].tolist()), target))
        assert sorted(found) == expected


def test_two_packed_segments_of_three_have_positions_0_1_2_0_1_2():
    """Worked example; that the second response cannot see the first is in sanity_check/test_probe.py."""
    [m] = microbatches(
        [_block([([5, 6, 7], [-100, 6, 7]), ([8, 9, 10], [-100, 9, 10])])],
        layout="packed",
        per_device_batch=1,
        max_tokens=1,
    )
    assert m.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert "attention_mask" not in m.inputs
    assert list(zip(m.index.tolist(), m.targets.tolist(), strict=True)) == [(0, 6), (1, 7), (3, 9), (4, 10)]


def test_padding_in_a_packed_micro_batch_is_a_segment_of_its_own():
    [m] = microbatches(
        [_block([([5, 6, 7], [-100, 6, 7])]), _block([([8, 9], [-100, 9])])],
        layout="packed",
        per_device_batch=2,
        max_tokens=1,
    )
    assert m.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]


def test_rows_micro_batches_stay_in_their_bound_unless_one_example_is_longer(packed):
    shards = Shards(packed.parts("train"))
    for m in all_blocks(shards, layout="rows", per_device_batch=2, max_tokens=50):
        rows, width = m.inputs["input_ids"].shape
        assert rows * width <= 50 or rows == 1


def test_the_layout_follows_the_device():
    assert layout_for(torch.device("cpu"), "sdpa") == "rows"
    assert layout_for(torch.device("cuda"), "sdpa") == "packed"
    assert layout_for(torch.device("cuda"), "flash_attention_2") == "flat"


def test_supervised_targets_never_predict_a_first_token():
    at, targets = supervised_targets([4, 5, 6, 7], starts=[0, 2])
    assert at.tolist() == [0, 2] and targets.tolist() == [5, 7]


def test_prefetching_passes_errors_on_and_ends_with_its_consumer():
    def items():
        yield 1
        raise ValueError("broken shard")

    found = prefetched(items(), depth=2)
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken shard"):
        next(found)
    endless = prefetched(iter(int, 1), depth=2)
    next(endless)
    endless.close()


def test_on_a_gpu_every_tensor_is_pinned_ahead_and_copied_without_waiting(packed, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(id(t)) or t)
    plan, shards = Plan(packed.file("plan.parquet")), Shards(packed.parts("train"))
    [update] = Feed(shards, plan, "flat", 2, 128, 1).iterate(0)
    used = [
        t
        for m in update.microbatches
        for t in (*m.inputs.values(), m.index, m.targets)
        if isinstance(t, torch.Tensor)
    ]
    assert used and {id(t) for t in used} <= set(pinned)
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: asked.append(non_blocking) or t)
    update.microbatches[0].to(torch.device("cpu"))
    assert asked and all(asked)


def test_a_damaged_shard_or_plan_is_an_input_error(packed):
    packed.parts("train")[0].write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        Shards(packed.parts("train"))
    packed.file("plan.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable update plan"):
        Plan(packed.file("plan.parquet"))

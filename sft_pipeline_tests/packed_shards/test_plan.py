"""Updates hold every block once per epoch and nearly as many supervised tokens each; what budgets report."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.errors import InputError
from sft_pipeline.stages.packed_shards.packing import pack
from sft_pipeline.stages.packed_shards.plan import PlanBudget, budget_of, plan_updates
from sft_pipeline.training.config import TrainingConfig

LENGTHS = [180, 95, 310, 150, 220, 60, 400, 130, 275, 200]


@settings(max_examples=200, deadline=None)
@given(
    supervised=st.lists(st.integers(1, 500), min_size=1, max_size=90),
    per_update=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_epoch_holds_every_block_once_in_even_updates(supervised, per_update, epochs, seed):
    plan = plan_updates(np.array(supervised), per_update, epochs, seed)
    blocks = len(supervised)
    each = math.ceil(blocks / per_update)
    assert plan.updates == each * epochs
    for epoch in range(epochs):
        assert sorted(plan.block[plan.epoch == epoch].tolist()) == list(range(blocks))
    sizes = plan.sizes()
    assert sizes.max() <= per_update and sizes.max() - sizes.min() <= 1
    assert (np.diff(plan.update) >= 0).all()
    for update in range(plan.updates):
        assert plan.position[plan.update == update].tolist() == list(range(sizes[update]))


@pytest.mark.parametrize(("strategy", "sigma"), [("bfd", 0.5), ("bfd", 1.0), ("none", 0.5)])
@pytest.mark.parametrize("per_update", [8, 16, 64])
def test_supervised_tokens_vary_by_at_most_2_percent(strategy, sigma, per_update):
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(5.2, sigma, 40_000), 2, 1024).astype(np.int64)
    supervised = np.maximum((lengths * rng.beta(3, 3, len(lengths))).astype(np.int64), 1)
    per_block = pack(lengths, 1024, strategy).sums(supervised)
    plan = plan_updates(per_block, per_update, 2, seed=0)
    totals, sizes = plan.sums(per_block), plan.sizes()
    usual = totals[sizes == per_update]
    assert len(usual) >= 100 and usual.std() / usual.mean() <= 0.02


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    per_update=st.sampled_from([8, 12, 32]),
    spare=st.integers(0, 7),
    kind=st.sampled_from(["log-normal", "bimodal"]),
    spread=st.floats(0.2, 0.8),
)
def test_a_hundred_updates_of_eight_blocks_or_more_vary_by_at_most_2_percent(
    seed, per_update, spare, kind, spread
):
    """Of packed examples. (Lone examples of two very unlike lengths cannot always be spread evenly.)"""
    rng = np.random.default_rng(seed)
    rows = 110 * per_update * 7
    if kind == "log-normal":
        supervised = rng.lognormal(4.5, spread, rows)
    else:
        supervised = np.where(rng.random(rows) < spread, rng.normal(40, 6, rows), rng.normal(300, 40, rows))
    supervised = np.clip(supervised, 1, 900).astype(np.int64)
    lengths = supervised + rng.integers(10, 120, rows)
    per_block = pack(lengths, 1024, "bfd").sums(supervised)
    per_block = np.resize(per_block, len(per_block) // per_update * per_update + spare)
    plan = plan_updates(per_block, per_update, 1, seed)
    totals, sizes = plan.sums(per_block), plan.sizes()
    usual = totals[sizes == per_update]
    if len(usual) >= 100:
        assert usual.std() / usual.mean() <= 0.02
    assert set(sizes.tolist()) <= {per_update, per_update - 1}
    assert (sizes < per_update).sum() == -len(per_block) % per_update


def test_epochs_differ_and_nothing_is_sorted_over_time():
    rng = np.random.default_rng(0)
    supervised = rng.integers(50, 500, 800)
    plan = plan_updates(supervised, 8, 2, seed=1)
    groups = [
        {frozenset(plan.block[(plan.update == u)].tolist()) for u in np.unique(plan.update[plan.epoch == e])}
        for e in (0, 1)
    ]
    assert not groups[0] & groups[1]
    first, second = supervised[plan.block[:400]], supervised[plan.block[400:800]]
    assert abs(first.mean() - second.mean()) < 0.02 * supervised.mean()
    by_position = [supervised[plan.block[plan.position == p]].mean() for p in range(8)]
    assert max(by_position) / min(by_position) < 1.2


def test_the_same_seed_gives_the_same_plan():
    supervised = np.random.default_rng(0).integers(50, 500, 200)
    a, b, c = (plan_updates(supervised, 8, 2, seed) for seed in (1, 1, 2))
    assert (a.block == b.block).all() and (a.block != c.block).any()


def test_no_update_holds_more_than_was_asked():
    """The worked example of the module's text, and its neighbours."""
    assert sorted(plan_updates(np.arange(1, 8), 4, 1, 0).sizes().tolist()) == [3, 4]
    assert sorted(plan_updates(np.arange(1, 6), 4, 1, 0).sizes().tolist()) == [2, 3]
    assert plan_updates(np.arange(1, 5), 4, 1, 0).sizes().tolist() == [4]
    assert plan_updates(np.arange(1, 9), 4, 1, 0).sizes().tolist() == [4, 4]


def test_a_plan_without_blocks_is_refused():
    with pytest.raises(InputError, match="no block to train on"):
        plan_updates(np.zeros(0, np.int64), 4, 1, 0)


def test_fewer_blocks_than_an_update_make_one_update():
    plan = plan_updates(np.array([5, 6, 7]), 8, 2, 0)
    assert plan.updates == 2 and plan.sizes().tolist() == [3, 3]


# -- the worked examples of the field, as the budget reports them


def planned(per_device: int, accumulation: int, processes: int) -> int:
    return TrainingConfig(
        per_device_batch=per_device, gradient_accumulation=accumulation, processes=processes
    ).planned_blocks


def plan_budget(
    lengths: np.ndarray,
    supervised: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    max_length: int = 8192,
    strategy: str = "none",
    blocks_per_update: int,
    epochs: int = 1,
) -> PlanBudget:
    weight = supervised.astype(float) if weight is None else weight
    packing = pack(lengths, max_length, strategy)
    plan = plan_updates(packing.sums(weight), blocks_per_update, epochs, seed=0)
    return budget_of(packing, plan, lengths, supervised, weight, max_length)


def unpacked(supervised: list[int], blocks_per_update: int) -> PlanBudget:
    """Of examples with as many supervised tokens."""
    counts = np.array(supervised)
    return plan_budget(counts + 1, counts, blocks_per_update=blocks_per_update)


def test_per_device_4_accumulation_8_world_4_is_128_examples():
    assert planned(4, 8, 4) == 128


def test_eight_microbatches_on_four_ranks_are_6240_supervised_tokens():
    microbatches = [180, 212, 164, 220, 198, 204, 175, 207]
    found = unpacked(microbatches * 4, planned(1, 8, 4)).supervised_tokens_per_update
    assert found.mean == found.min == found.max == 6_240


def test_4_8_4_against_2_16_8_is_a_ratio_of_2():
    assert planned(2, 16, 8) / planned(4, 8, 4) == 2


def test_equal_examples_are_not_equal_supervised_tokens():
    assert planned(3, 12, 2) == planned(6, 6, 2) == 72
    assert unpacked([5_200] * 2, 2).supervised_tokens_per_update.mean == 10_400
    assert unpacked([4_300] * 2, 2).supervised_tokens_per_update.mean == 8_600


def test_padding_ten_examples_to_2048_wastes_90_percent_and_packing_fits_one_block():
    budget = plan_budget(
        np.array(LENGTHS), np.array(LENGTHS) // 2, max_length=2048, strategy="bfd", blocks_per_update=4
    )
    assert budget.padding_waste == pytest.approx(0.901, abs=5e-4)
    assert (budget.blocks, budget.updates, budget.examples) == (1, 1, 10)
    assert budget.packing_efficiency == pytest.approx(2020 / 2048, abs=1e-6) and sum(LENGTHS) == 2020


def test_without_packing_an_update_holds_that_many_examples():
    budget = plan_budget(
        np.array(LENGTHS),
        np.array(LENGTHS) // 2,
        max_length=2048,
        strategy="none",
        blocks_per_update=5,
        epochs=3,
    )
    assert budget.updates == 6 and budget.examples_per_update.mean == 5 and budget.examples_per_update.cv == 0
    supervised = budget.supervised_tokens_per_update.mean * 6
    assert supervised == pytest.approx(3 * budget.supervised_tokens, rel=1e-3)
    assert set(budget.to_json()["supervised_tokens_per_update"]) == {"mean", "min", "max", "cv"}


def test_updates_are_balanced_by_loss_weight_where_messages_have_one():
    rng = np.random.default_rng(5)
    supervised = rng.integers(20, 200, 4_000)
    weight = supervised * rng.choice([0.1, 1.0, 2.5], 4_000)
    budget = plan_budget(supervised + 50, supervised, weight, blocks_per_update=16)
    assert budget.balance_cv < 0.005 and budget.loss_weight_per_update.cv == budget.balance_cv
    assert budget.supervised_tokens_per_update.cv > 5 * budget.balance_cv
    total = budget.loss_weight_per_update.mean * budget.updates
    assert total == pytest.approx(weight.sum(), rel=1e-4)
    assert plan_budget(supervised + 50, supervised, blocks_per_update=16).loss_weight_per_update is None

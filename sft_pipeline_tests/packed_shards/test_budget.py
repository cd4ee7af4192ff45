"""The worked examples of the field, as the budget code reports them."""

import numpy as np
import pytest

from sft_pipeline.stages.packed_shards.budget import (
    examples_per_update,
    packing_efficiency,
    padding_waste,
    plan_budget,
    ratio,
    supervised_tokens_per_update,
)

LENGTHS = [180, 95, 310, 150, 220, 60, 400, 130, 275, 200]


def test_per_device_4_accumulation_8_world_4_is_128_examples():
    assert examples_per_update(4, 8, 4) == 128


def test_eight_microbatches_on_four_ranks_are_6240_supervised_tokens():
    assert supervised_tokens_per_update([180, 212, 164, 220, 198, 204, 175, 207], 4) == 6_240


def test_4_8_4_against_2_16_8_is_a_ratio_of_2():
    assert ratio((4, 8, 4), (2, 16, 8)) == 2


def test_equal_examples_are_not_equal_supervised_tokens():
    assert examples_per_update(3, 12, 2) == examples_per_update(6, 6, 2) == 72
    assert supervised_tokens_per_update([5_200], 2) == 10_400
    assert supervised_tokens_per_update([4_300], 2) == 8_600


def test_padding_ten_examples_to_2048_wastes_90_percent_and_packing_fits_one_block():
    assert padding_waste(LENGTHS, 2048) == pytest.approx(0.901, abs=5e-4)
    budget = plan_budget(
        np.array(LENGTHS),
        np.array(LENGTHS) // 2,
        max_length=2048,
        strategy="bfd",
        blocks_per_update=4,
        epochs=1,
        seed=0,
    )
    assert (budget.blocks, budget.updates, budget.examples) == (1, 1, 10)
    assert (
        budget.packing_efficiency
        == pytest.approx(sum(LENGTHS) / 2048, abs=1e-6)
        == pytest.approx(packing_efficiency(2020, 1, 2048), abs=1e-6)
    )


def test_without_packing_an_update_holds_that_many_examples():
    budget = plan_budget(
        np.array(LENGTHS),
        np.array(LENGTHS) // 2,
        max_length=2048,
        strategy="none",
        blocks_per_update=5,
        epochs=3,
        seed=0,
    )
    assert budget.updates == 6 and budget.examples_per_update.mean == 5 and budget.examples_per_update.cv == 0
    assert budget.supervised_tokens_per_update.mean * 6 == pytest.approx(
        3 * budget.supervised_tokens, rel=1e-3
    )
    assert set(budget.to_json()["supervised_tokens_per_update"]) == {"mean", "min", "max", "cv"}

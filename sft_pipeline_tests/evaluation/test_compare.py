import math

import numpy as np
import pytest

from sft_pipeline.stages.evaluation.compare import compare, sign_test


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (7, 1, 2 * 9 / 256),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_sign_test_is_exact(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-12)


def test_sign_test_of_many_rows():
    assert 0 < sign_test(50_500, 49_500) < 0.01 and sign_test(100_000, 0) == pytest.approx(0, abs=1e-300)


def test_compare_is_paired_and_repeatable():
    base = [0, 0, 1, 1, 0, 0]
    tuned = [1, 1, 1, 0, 1, 0]
    groups = ["a", "a", "b", "b", "c", "d"]
    found = compare("policy", base, tuned, groups)
    assert (found.base.value, found.tuned.value) == (pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert (found.wins, found.losses, found.ties, found.rows, found.groups) == (3, 1, 2, 6, 4)
    assert found.difference.low <= found.difference.value <= found.difference.high
    assert found == compare("policy", base, tuned, groups)


def test_the_interval_is_over_groups_not_rows():
    """Ten equal rows of one group say no more than one: the interval must not shrink."""
    rng = np.random.default_rng(0)
    base, tuned = rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    single = compare("x", base, tuned, [str(i) for i in range(40)])
    repeated = compare(
        "x", np.repeat(base, 10), np.repeat(tuned, 10), [str(i) for i in np.repeat(np.arange(40), 10)]
    )
    assert repeated.difference == single.difference


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    truth, hits = 0.2, 0
    for seed in range(200):
        base = rng.random(150) < 0.5
        tuned = rng.random(150) < 0.7
        i = compare("x", base, tuned, [str(j) for j in range(150)], seed=seed, resamples=400).difference
        hits += i.low <= truth <= i.high
    assert 180 <= hits <= 198


def test_loss_is_a_ratio_of_sums_and_lower_wins():
    found = compare("test_loss", [10.0, 1.0], [4.0, 2.0], ["a", "b"], weights=[4, 1], lower_is_better=True)
    assert found.base.value == 11 / 5 and found.tuned.value == 6 / 5
    assert (found.wins, found.losses) == (1, 1)


def test_no_rows_give_nulls():
    found = compare("x", [], [], [])
    assert math.isnan(found.base.value) and found.to_json()["difference"] == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_no_spread_in_the_sample_is_not_certainty():
    """24 of 24 in 12 groups: the exact interval of 12 of 12, not 1 to 1."""
    found = compare("x", [0.0] * 24, [1.0] * 24, [str(i // 2) for i in range(24)])
    assert found.tuned.low == pytest.approx(0.7354, abs=1e-4) and found.tuned.high == 1
    assert found.base.high == pytest.approx(1 - 0.7354, abs=1e-4) and found.base.low == 0
    assert found.difference.value == 1 == found.difference.high and found.difference.low == pytest.approx(
        1 - 0.2646 * 2**0.5, abs=1e-3
    )

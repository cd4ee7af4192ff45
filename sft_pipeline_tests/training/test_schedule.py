"""Learning rates."""

import pytest

from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.schedule import Schedule, curve, learning_rate, sampled


def test_cosine_from_2e_4_to_0_over_1000_steps_is_half_the_peak_at_step_500():
    """Worked example."""
    assert learning_rate(500, 1000, Schedule("cosine", peak=2e-4)) == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_above_zero_to_the_peak_and_nothing_exceeds_it(kind):
    rates = curve(200, Schedule(kind, peak=1e-3, minimum=1e-5, warmup=0.1))
    assert 0 < rates[0] < rates[10] < rates[19] < 1e-3
    assert rates[20] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3) and min(rates[20:]) >= 1e-5 - 1e-12


def test_linear_and_wsd_fall_where_they_should():
    assert learning_rate(50, 100, Schedule("linear", peak=1.0, minimum=0.2)) == pytest.approx(0.6)
    wsd = Schedule("wsd", peak=1.0, decay=0.2)
    assert (
        learning_rate(80, 100, wsd) == 1.0
        and learning_rate(90, 100, wsd) == pytest.approx(0.5)
        and learning_rate(99, 100, wsd) == pytest.approx(0.05)
    )
    assert learning_rate(99, 100, Schedule("constant", peak=1.0)) == 1.0


def test_the_default_peak_follows_the_parameterization():
    assert Schedule.of(TrainingConfig(), ModelConfig(base="x", parameterization="full")).peak == 2e-5
    assert Schedule.of(TrainingConfig(), ModelConfig(base="x", parameterization="lora")).peak == 1e-4
    assert Schedule.of(TrainingConfig(learning_rate=3e-4), ModelConfig(base="x")).peak == 3e-4


def test_a_run_shorter_than_its_warm_up_still_has_a_rate():
    assert all(r > 0 for r in curve(1, Schedule("cosine", peak=1e-3, warmup=0.05)))


@pytest.mark.parametrize("total", [1, 7, 50, 51, 484, 100_000])
def test_a_sampled_curve_has_its_ends_and_its_peak(total):
    schedule = Schedule("cosine", peak=1e-3, warmup=0.05)
    points = sampled(total, schedule)
    assert len(points) <= 50 and points == sorted(set(points))
    assert points[0] == (1, learning_rate(0, total, schedule)) and points[-1] == (
        total,
        learning_rate(total - 1, total, schedule),
    )
    assert max(r for _, r in points) == max(curve(total, schedule))

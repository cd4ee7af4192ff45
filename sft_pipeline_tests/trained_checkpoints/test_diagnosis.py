"""What is found in the curves, and when a training evaluates, saves and stops."""

import math
import random

import pytest

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints.diagnosis import UpdateRows, diagnose
from sft_pipeline.stages.trained_checkpoints.watch import Watch
from sft_pipeline.training.config import EarlyStopping
from sft_pipeline.training.progress import Intervals


def curve(f, n=100):
    draw = random.Random(0)
    return [(i + 1, f(i) * (1 + 0.05 * (draw.random() - 0.5))) for i in range(n)]


def kinds(*args):
    return [f.kind for f in diagnose(*args)]


def test_a_sound_run_has_no_findings():
    assert (
        kinds(
            curve(lambda i: 0.2 + 2 * math.exp(-i / 20)),
            [(s, 0.3 + 2 * math.exp(-s / 20)) for s in range(0, 101, 10)],
        )
        == []
    )


@pytest.mark.parametrize(
    "f,kind",
    [
        (lambda i: 2.0, "not_decreasing"),
        (lambda i: 2.0 + 0.02 * i, "diverging"),
        (lambda i: 2.0 if i < 3 else 0.001, "near_zero_too_fast"),
    ],
)
def test_the_slope_is_read(f, kind):
    assert kind in kinds(curve(f), [])


def test_a_spike_names_its_update_blocks_and_rows_and_the_command_that_shows_them():
    loss = curve(lambda i: 3.0 if i == 60 else 0.5 + 2 * math.exp(-i / 20))
    rows_of = lambda step: UpdateRows([7, 8], [f"row-{step}"], f"sft replay abc --update {step}")  # noqa: E731
    [spike] = [f for f in diagnose(loss, [], rows_of) if f.kind == "spike"]
    assert (spike.step, spike.blocks, spike.row_ids) == (61, [7, 8], ["row-61"])
    for named in ("update 61", "blocks 7, 8", "row-61", "`sft replay abc --update 61`"):
        assert named in spike.words


def test_overfitting_needs_validation_to_rise_while_training_falls():
    train = curve(lambda i: 2 * math.exp(-i / 40))
    rising = [(0, 2.0), (20, 1.0), (40, 0.9), (60, 1.1), (80, 1.2), (100, 1.3)]
    assert "overfitting" in kinds(train, rising)
    assert "overfitting" not in kinds(train, [(s, v) for s, v in rising[:4]])


def test_early_stopping_counts_evaluations_without_improvement():
    watch = Watch(total=10, report=Reporter(), early_stopping=EarlyStopping(patience=2, min_delta=0.1))
    for step, value in ((0, 2.0), (1, 1.0), (2, 0.95)):
        watch.evaluated(step, value)
        assert not watch.should_stop()
    watch.evaluated(3, 0.91)
    assert watch.should_stop() and "has not improved on 1.0000" in watch.stop_reason()
    assert watch.best == (3, 0.91)


def test_the_last_update_is_evaluated_and_saved_whatever_the_intervals():
    plan = Intervals(total=10, evaluate=4, save=3)
    assert [s for s in range(1, 11) if plan.evaluates(s)] == [4, 8, 10]
    assert [s for s in range(1, 11) if plan.saves(s)] == [3, 6, 9, 10]

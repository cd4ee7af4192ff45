"""Single updates of a training: those that the gradient scaler skips, their learning rate, their seconds."""

import itertools
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from sft_pipeline.stages.trained_checkpoints.train import CheckpointSaver
from sft_pipeline.training import trainer as trainer_module
from sft_pipeline.training.schedule import Schedule, learning_rate
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline_tests.trained_checkpoints.run_tiny import config_of, make, run

RATES = {"learning_rate": 3e-3, "min_learning_rate": 1e-4, "schedule": "linear", "warmup": 0.4}


@pytest.fixture
def root(tmp_path):
    make(tmp_path)
    return tmp_path


class SkippingScaler(torch.amp.GradScaler):
    """Skips before the optimizer is called, as the scaler does for an optimizer without a fused kernel."""

    def step(self, optimizer, *args, **kwargs):
        optimizer._step_supports_amp_scaling = False
        return super().step(optimizer, *args, **kwargs)


def overflow(monkeypatch, scaler, updates):
    """Trainings have this gradient scaler, as in fp16; the gradient overflows in these updates.

    Returns:
        A list that the trained weights are added to after each update.
    """
    weights = []
    init, report = SupervisedTrainer.__init__, SupervisedTrainer.report_update

    def with_scaler(self, model, **settings):
        init(self, model, **settings)
        self.accelerator.scaler = scaler("cpu", init_scale=1.0)
        for p in self.trained_parameters():
            p.register_hook(lambda g: g * float("inf") if self.state.global_step + 1 in updates else g)

    def keeping(self, step):
        weights.append([p.detach().clone() for p in self.trained_parameters()])
        report(self, step)

    def trained_parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    monkeypatch.setattr(SupervisedTrainer, "trained_parameters", trained_parameters, raising=False)
    monkeypatch.setattr(SupervisedTrainer, "__init__", with_scaler)
    monkeypatch.setattr(SupervisedTrainer, "report_update", keeping)
    return weights


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, SkippingScaler])
def test_updates_that_the_gradient_scaler_skips_are_counted_and_change_no_rate(root, monkeypatch, scaler):
    weights = overflow(monkeypatch, scaler, {3, 4})
    built = run(root, "fp16", **RATES)
    unchanged = [
        step
        for step, (before, after) in enumerate(itertools.pairwise(weights), 2)
        if all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    ]
    assert unchanged == [3, 4]
    [check] = [c for c in built.checks if c.name == "finite_loss"]
    assert check.passed and check.evidence["skipped"].value == 2
    assert "the gradient of 2 overflowed in fp16, so they were not applied: update 3, 4." in check.description
    history = pq.read_table(root / "fp16" / "history.parquet").to_pylist()
    assert [r["step"] for r in history if r["name"] == "skipped"] == [3, 4]
    config = config_of(root, **RATES)
    schedule = Schedule.of(config.training, config.model)
    expected = [learning_rate(n, 6, schedule) for n in range(6)]
    assert [r["value"] for r in history if r["name"] == "learning_rate"] == pytest.approx(expected)


def test_a_training_whose_updates_were_all_skipped_fails_the_check(root, monkeypatch):
    overflow(monkeypatch, torch.amp.GradScaler, {1, 2})
    built = run(root, "none", max_steps=2)
    [check] = [c for c in built.checks if c.name == "finite_loss"]
    assert not check.passed and "the gradient of 2 overflowed" in check.description


def test_the_seconds_of_an_update_hold_no_checkpoint_and_no_evaluation(root, monkeypatch):
    """By a clock that only an evaluation and a checkpoint move."""
    clock = [0.0]

    def slow(method):
        def moving(*args):
            clock[0] += 1000.0
            return method(*args)

        return moving

    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(SupervisedTrainer, "validation_loss", slow(SupervisedTrainer.validation_loss))
    monkeypatch.setattr(CheckpointSaver, "__call__", slow(CheckpointSaver.__call__))
    run(root, "timed")
    assert clock[0] == 7000.0  # four evaluations, three checkpoints
    throughput = pq.read_table(root / "timed" / "throughput.parquet").to_pylist()
    assert [r["value"] for r in throughput if r["name"] == "seconds"] == [0.0] * 6


def test_memory_is_not_filled_before_it_is_written(root):
    """Deterministic algorithms fill every allocation with NaN unless told not to."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    run(root, "unfilled", max_steps=1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory

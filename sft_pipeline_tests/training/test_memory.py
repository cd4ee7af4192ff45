"""When one device is no longer enough."""

import re

import pytest

from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.memory import DeviceBudget, advise, estimate
from sft_pipeline_tests.training import tiny

TOKENS, SUPERVISED = 4 * 64, 64


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(
        tmp_path_factory.mktemp("advice") / "base", model=tiny.llama(tie=False, hidden=128, layers=4)
    )


def advice_for(base, available, parameterization="full", gpu=True, **training):
    model = ModelConfig(base=str(base), parameterization=parameterization)
    settings = TrainingConfig(**training)
    memory = estimate(model, settings, tokens=TOKENS, supervised=SUPERVISED, gpu=gpu)
    return memory, advise(
        memory,
        model,
        settings,
        DeviceBudget(int(available(memory)), gpu),
        tokens=TOKENS,
        supervised=SUPERVISED,
    )


def test_what_fits_is_said_and_nothing_advised(base):
    _, words = advice_for(base, lambda m: 2 * m.total)
    assert words.endswith("GPU memory (50%)")


def test_what_would_fit_is_named_with_the_same_update(base):
    _, words = advice_for(base, lambda m: 0.6 * m.total)
    assert "one device is not enough as it is" in words and "model.parameterization lora" in words
    _, words = advice_for(base, lambda m: m.total - m.activations // 4, parameterization="qlora")
    assert "training.per_device_batch 1 with training.blocks_per_update 4" in words


def test_what_fits_nowhere_is_to_be_sharded(base):
    least = {"parameterization": "qlora", "gradient_checkpointing": True, "per_device_batch": 1}
    _, words = advice_for(base, lambda m: (m.activations + m.logits) / 0.9 + m.weights / 2, **least)
    assert "whatever is set" in words and re.search(
        r"shard the weights .* over \d+ or more such devices", words
    )
    _, words = advice_for(base, lambda m: m.activations / 2, **least)
    assert "activations alone" in words


def test_processes_on_a_cpu_share_its_memory_and_on_gpus_do_not(base):
    share = lambda gpu: advice_for(base, lambda m: 2 * m.total, gpu=gpu, processes=2)[1]  # noqa: E731
    assert "2 x" in share(False) and "(100%)" in share(False) and "(50%)" in share(True)

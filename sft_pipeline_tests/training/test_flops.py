"""MFU: the devices that are known, and the arithmetic of a training."""

import pytest

from sft_pipeline.training.flops import Arithmetic, arithmetic, meter, peak_flops, utilization
from sft_pipeline.training.progress import UpdateNumbers
from sft_pipeline_tests.training import tiny
from sft_pipeline_tests.training.reference import with_lora


@pytest.mark.parametrize(
    "name,tera",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", 165.2),
        ("Some Accelerator 9000", None),
        ("", None),
    ],
)
def test_peaks_are_known_by_name(name, tera):
    assert peak_flops(name) == (tera * 1e12 if tera else None)


def test_full_fine_tuning_is_6n_a_frozen_base_4n_and_attention_comes_on_top():
    full = Arithmetic(body=1000, trained=1000, head=0, head_trained=False, layers=0, width=0)
    frozen = Arithmetic(body=1000, trained=0, head=0, head_trained=False, layers=0, width=0)
    assert full.of(10, 0, 1) == 6 * 1000 * 10 and frozen.of(10, 0, 1) == 4 * 1000 * 10
    attention = Arithmetic(body=0, trained=0, head=0, head_trained=False, layers=2, width=64)
    # 12 x layers x width x keys a token, half of it causal; two examples of 50 tokens see 50 keys, not 100.
    assert attention.of(100, 0, 2) == 100 * 6 * 2 * 64 * 50
    head = Arithmetic(body=0, trained=0, head=7, head_trained=True, layers=0, width=0)
    assert head.of(100, 30, 2) == 6 * 7 * 30


def test_a_model_is_counted_as_it_is():
    model = tiny.llama(tie=False).requires_grad_(True)
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    full = arithmetic(model)
    assert full == Arithmetic(2 * layer, 2 * layer, 96 * 32, True, 2, 32)
    lora = arithmetic(with_lora(tiny.llama()))
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (lora.body, lora.trained, lora.head_trained) == (2 * layer + adapters, adapters, False)


def test_utilization_is_a_share_of_all_devices_and_unknown_on_a_cpu():
    assert utilization(312e12, 2.0, "NVIDIA A100-SXM4-40GB", 2) == pytest.approx(0.25)
    assert utilization(1e12, 1.0, "") is None


def test_only_a_known_gpu_in_16_bits_is_metered():
    model = tiny.llama().requires_grad_(True)
    assert meter(model, "", "fp32", 1) is None and meter(model, "NVIDIA L4", "fp32", 1) is None
    update = UpdateNumbers(1, 2.0, 1e-3, 1.0, examples=2, tokens=100, supervised=30, seconds=1e-6)
    expected = arithmetic(model).of(100, 30, 2) / 1e-6 / (2 * 121e12)
    assert meter(model, "NVIDIA L4", "bf16", 2)(update) == pytest.approx(expected) and 0 < expected < 1

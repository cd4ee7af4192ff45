"""The loss and its gradients against a float64, padded, unpacked reference."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sft_pipeline.learning import loss as loss_module
from sft_pipeline.learning.feed import microbatches, supervised_targets
from sft_pipeline.learning.loss import install_supervised_forward, output_transform
from sft_pipeline.learning.shards import Block
from sft_pipeline_tests.learning import tiny


def blocks_of(rows, max_length=64):
    names = ("input_ids", "labels", "position_ids", "lengths")
    return [
        Block(b["block"], *(np.array(b[n], dtype=np.int32) for n in names))
        for b in tiny.pack(rows, max_length)
    ]


def reference(model, rows):
    """Mean NLL over supervised tokens and its gradients, in float64, one padded batch with a mask, full logits."""
    model = copy.deepcopy(model).double().eval()
    width = max(r["length"] for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (width - r["length"]) for r in rows])
    labels = torch.tensor([r["labels"] + [-100] * (width - r["length"]) for r in rows])
    mask = torch.tensor([[1] * r["length"] + [0] * (width - r["length"]) for r in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    nll = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )
    mean = nll / (labels[:, 1:] != -100).sum()
    mean.backward()
    return mean.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ours(model, rows, *, layout, accumulation, max_length=64):
    """The same through the feed and the supervised forward, in fp32."""
    model = copy.deepcopy(model).eval()
    install_supervised_forward(model)
    blocks = blocks_of(rows, max_length)
    per = max(1, math.ceil(len(blocks) / accumulation))
    batches = microbatches(blocks, layout=layout, per_device_batch=per, max_tokens=per * max_length)
    supervised = sum(len(m.targets) for m in batches)
    total = 0.0
    for m in batches:
        nll = model(**m.inputs, supervised_index=m.index, supervised_targets=m.targets, reduction="sum")[
            "nll"
        ]
        (nll / supervised).backward()
        total += nll.item()
    return total / supervised, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0),
    )
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave the gradients of A zero too
            torch.nn.init.normal_(p, std=0.1)
    return wrapped


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("kind", ["full", "full_untied", "lora", "qwen"])
def test_loss_and_gradients_equal_a_float64_padded_unpacked_reference(kind, layout, accumulation):
    model = {
        "full": tiny.llama,
        "full_untied": lambda: tiny.llama(tie=False),
        "lora": lambda: with_lora(tiny.llama()),
        "qwen": tiny.qwen,
    }[kind]()
    if kind != "lora":
        model.requires_grad_(True)
    rows = tiny.examples(24, seed=3)
    expected, expected_grads = reference(model, rows)
    found, grads = ours(model, rows, layout=layout, accumulation=accumulation)
    assert found == pytest.approx(expected, rel=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        error = (grad.double() - expected_grads[name]).norm() / expected_grads[name].norm().clamp(min=1e-30)
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_chunks_and_gradient_checkpointing_change_nothing(monkeypatch):
    model = tiny.llama().requires_grad_(True)
    rows = tiny.examples(24, seed=4)
    expected, expected_grads = ours(model, rows, layout="packed", accumulation=1)
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocabulary, device: 5)
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.train()
    found, grads = ours(checkpointed, rows, layout="packed", accumulation=1)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap,scale", [(5.0, 1.0), (None, 0.25), (30.0, 2.0)])
def test_softcapping_and_scaling_have_the_gradient_of_autograd(cap, scale):
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(7, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(11, 8, dtype=torch.float64, requires_grad=True),
    )
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(7)
    logits = F.linear(hidden, weight, bias) * scale
    logits = torch.tanh(logits / cap) * cap if cap else logits
    expected = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), (hidden, weight, bias))
    found = torch.autograd.grad(
        loss_module._SummedNll.apply(hidden, weight, bias, targets, scale, cap, torch.float64),
        (hidden, weight, bias),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_architectures_that_transform_their_logits_are_read_from_their_config():
    def config(**values):
        inner = SimpleNamespace(**values)
        return SimpleNamespace(get_text_config=lambda: inner)

    assert output_transform(config()) == (1.0, None)
    assert output_transform(config(final_logit_softcapping=30.0)) == (1.0, 30.0)
    assert output_transform(config(logits_scaling=8.0)) == (0.125, None)
    assert output_transform(config(logit_scale=0.5)) == (0.5, None)


def test_a_softcapped_model_is_taken_apart_rightly():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.7, attn_implementation="eager")
    ).eval()  # fmt: skip
    rows = tiny.examples(8, seed=5)
    expected, expected_grads = reference(model, rows)
    found, grads = ours(model, rows, layout="packed", accumulation=1)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, grad in grads.items():
        assert (grad.double() - expected_grads[name]).norm() / expected_grads[name].norm().clamp(
            min=1e-30
        ) < 1e-5, name


def test_a_model_that_cannot_be_taken_apart_falls_back_loudly_and_rightly(caplog):
    model = tiny.llama().requires_grad_(True)
    rows = tiny.examples(8, seed=6)
    expected, expected_grads = ours(model, rows, layout="packed", accumulation=1)

    class Odd(torch.nn.Linear):
        pass

    odd = Odd(32, tiny.VOCABULARY, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    copied = copy.deepcopy(model)
    assert install_supervised_forward(copied).startswith("full: its output layer is Odd")
    assert "whole logits" in caplog.text
    found, grads = ours(model, rows, layout="packed", accumulation=1)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6)


def test_an_update_with_nothing_supervised_gives_zero_gradients_not_an_error():
    model = tiny.llama().requires_grad_(True)
    install_supervised_forward(model)
    none = torch.zeros(0, dtype=torch.long)
    nll = model(
        input_ids=torch.tensor([[1, 5, 6]]), supervised_index=none, supervised_targets=none, reduction="sum"
    )["nll"]
    nll.backward()
    assert nll.item() == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_prefix_losses_and_answer_losses_full_sequence_0_596_response_only_2_000():
    """Worked example: prefix .03 .04 .02 .05 .03, answer 2.20 1.80. (4.17 / 7 = 0.5957.)"""
    wanted = torch.tensor([0.03, 0.04, 0.02, 0.05, 0.03, 2.20, 1.80], dtype=torch.float64)
    # One hidden vector per position whose two-way logits give exactly the wanted NLL of target 0.
    logit = -torch.log(torch.expm1(wanted))
    hidden = logit[:, None]
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)

    def mean_loss(labels):
        at, targets = supervised_targets(labels)
        nll = loss_module._SummedNll.apply(
            hidden[torch.from_numpy(at)], weight, None, torch.from_numpy(targets), 1.0, None, torch.float64
        )
        return nll.item() / len(targets)

    first = -100  # what the first token is, nothing predicts
    assert round(mean_loss([first, 0, 0, 0, 0, 0, 0, 0]), 3) == 0.596
    assert round(mean_loss([first, -100, -100, -100, -100, -100, 0, 0]), 3) == 2.000

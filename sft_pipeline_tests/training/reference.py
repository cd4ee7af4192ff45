"""The loss and its gradients twice: in float64, padded and unpacked with full logits; and as the training
takes them.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sft_pipeline.training.data import microbatches
from sft_pipeline.training.loss import install_supervised_forward
from sft_pipeline.training.shards import Block
from sft_pipeline_tests.training import tiny

Gradients = dict[str, torch.Tensor]


def blocks_of(rows: list[dict[str, Any]], max_length: int = 64) -> list[Block]:
    names = ("input_ids", "labels", "position_ids", "seq_lengths")
    return [
        Block(
            b["block"],
            *(np.array(b[n], dtype=np.int32) for n in names),
            None if b["weights"] is None else np.array(b["weights"], dtype=np.float32),
        )
        for b in tiny.pack(rows, max_length)
    ]


def reference(model: Any, rows: list[dict[str, Any]]) -> tuple[float, Gradients]:
    """Mean (weighted) NLL over supervised tokens and its gradients, in float64, one padded batch with a mask,
    full logits.

    4-bit weights are taken dequantized.
    """
    model = dequantized(copy.deepcopy(model)).double().eval()
    width = max(r["length"] for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (width - r["length"]) for r in rows])
    labels = torch.tensor([r["labels"] + [-100] * (width - r["length"]) for r in rows])
    mask = torch.tensor([[1] * r["length"] + [0] * (width - r["length"]) for r in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    nll = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]),
        labels[:, 1:].reshape(-1),
        ignore_index=-100,
        reduction="none",
    )
    weights = torch.tensor(
        [r.get("weights", [1.0] * r["length"]) + [0.0] * (width - r["length"]) for r in rows]
    )
    weights = weights.double()[:, 1:].reshape(-1) * (labels[:, 1:].reshape(-1) != -100)
    mean = (nll * weights).sum() / weights.sum()
    mean.backward()
    return mean.item(), gradients(model)


def ours(
    model: Any, rows: list[dict[str, Any]], *, layout: Any, accumulation: int, max_length: int = 64
) -> tuple[float, Gradients]:
    """The same through the feed and the supervised forward, in training mode and the model's precision."""
    model = copy.deepcopy(model).train()
    install_supervised_forward(model)
    blocks = blocks_of(rows, max_length)
    per = max(1, math.ceil(len(blocks) / accumulation))
    batches = microbatches(blocks, layout=layout, per_device_batch=per, max_tokens=per * max_length)
    weight = sum(m.weight for m in batches)
    total = 0.0
    for m in batches:
        given = {"index": m.index, "targets": m.targets, "weights": m.weights}
        nll = model(**m.inputs, **{f"supervised_{n}": v for n, v in given.items()}, reduction="sum")["nll"]
        (nll / weight).backward()
        total += nll.item()
    return total / weight, gradients(model)


def gradients(model: Any) -> Gradients:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Relative L2 distance of each tensor."""
    assert found.keys() == expected.keys()
    return {
        n: float((g.double() - expected[n].double()).norm() / expected[n].double().norm().clamp(min=1e-30))
        for n, g in found.items()
    }


def dequantized(model: Any) -> Any:
    """Plain linear layers in the place of 4-bit ones, with the values that those stand for."""
    try:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        return model
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                plain = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                values = dequantize_4bit(child.weight.data, child.weight.quant_state)
                plain.weight = torch.nn.Parameter(values.float(), requires_grad=False)
                if child.bias is not None:
                    plain.bias = child.bias
                setattr(parent, name, plain)
    return model


def with_lora(model: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            lora_dropout=0.0,
            **settings,
        ),
    )
    return away_from_zero(wrapped)


def away_from_zero(model: Any) -> Any:
    """An adapter's B is zero at the start, which would leave the gradients of A zero too."""
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


def gemma() -> Any:
    """Caps its logits, low enough to matter, and the scores of its attention."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return _of(
        Gemma2ForCausalLM,
        Gemma2Config(
            final_logit_softcapping=0.7,
            attn_logit_softcapping=2.0,
            head_dim=8,
            attn_implementation="eager",
            **_SIZES,
        ),
    )


def cohere() -> Any:
    """Multiplies its logits."""
    from transformers import CohereConfig, CohereForCausalLM

    return _of(CohereForCausalLM, CohereConfig(logit_scale=0.25, **_SIZES))


def granite() -> Any:
    """Divides its logits, and scales embeddings, attention and residuals."""
    from transformers import GraniteConfig, GraniteForCausalLM

    settings = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    return _of(GraniteForCausalLM, GraniteConfig(**settings, **_SIZES))


_SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": tiny.EOS,
    "pad_token_id": 0,
}


def _of(architecture: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return architecture(config).eval()

"""Proof that what is exported is what was judged: logits, greedy answers, and the prompt that a server will send."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.training.threads import threads_for

PROBE_TOKENS = 256
# Largest difference of a logit, in units of the largest logit, that rounding the weights to a dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Difference:
    """Of two models' logits on the same ids.

    Attributes:
        largest: Largest absolute difference.
        scale: Largest absolute reference logit.
        agreement: Share of positions whose most likely token is the same.
    """

    largest: float
    scale: float
    agreement: float

    def within(self, dtype: torch.dtype) -> bool:
        return self.largest <= TOLERANCE[dtype] * max(1.0, self.scale)


@torch.inference_mode()
def logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """fp32 logits [length, vocabulary] of each sequence (its first 256 tokens), on the CPU, one at a time."""
    device = next(model.parameters()).device
    found = []
    with threads_for(model):
        for ids in sequences:
            batch = torch.tensor([list(ids)[:PROBE_TOKENS]], device=device)
            found.append(model(input_ids=batch, use_cache=False).logits[0].float().cpu())
    return found


def difference(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Difference:
    """Compares logits position by position. A NaN on either side is an infinite difference."""
    largest = max(
        float((a - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in zip(reference, other, strict=True)
    )
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(reference, other))
    return Difference(
        largest, max(float(a.abs().max()) for a in reference), same / sum(len(a) for a in reference)
    )


@torch.inference_mode()
def greedy(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """New ids for each prompt, by transformers' own `generate`, one prompt at a time, as any user would call it.

    Args:
        settings: eos_token_id and pad_token_id, where the model's own generation config is not to be relied on.
    """
    device = next(model.parameters()).device
    found = []
    with threads_for(model):
        for ids in prompts:
            batch = torch.tensor([list(ids)], device=device)
            out = model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **settings,
            )
            found.append(out[0, len(ids) :].tolist())
    return found


def reload_model(folder: Path, *, trust_remote_code: bool) -> Any:
    """The exported weights as a stranger would load them."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype="auto", use_safetensors=True, trust_remote_code=trust_remote_code
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def reload_tokenizer(folder: Path) -> Any:
    """The exported tokenizer as a stranger would load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def served_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **variables: Any
) -> list[int]:
    """The ids that a server sends to have the next message generated."""
    found = tokenizer.apply_chat_template(
        list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False, **variables
    )
    return list(found)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first position at which two id sequences differ, None where they are equal."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))

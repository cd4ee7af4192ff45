"""Two models side by side: their logits on the same ids, and their greedy answers."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sft_pipeline.training.process import threads_for

PROBE_TOKENS = 256  # of each sequence whose logits are compared
# Largest difference of a logit, in units of the largest logit, that rounding the weights to a dtype explains.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# By the precision of the training: how far, as a share of it, a loss may be from the recorded one. In fp32
# merging and another layout round otherwise; in half precision training autocasts, which evaluation does not.
LOSS_TOLERANCE = {"fp32": 5e-4, "bf16": 2e-2, "fp16": 2e-2}
SMALL_LOSS = 0.2  # nats; below it, differences are measured as shares of this


def loss_difference(loss: float, recorded: float) -> float:
    """How far a loss is from the recorded one, as a share of it; NaN where it is no number."""
    return abs(loss - recorded) / max(abs(recorded), SMALL_LOSS)


@dataclass(frozen=True)
class LogitDifference:
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
        # One by one: padding would make models differ that agree on the row itself.
        for ids in sequences:
            batch = torch.tensor([list(ids)[:PROBE_TOKENS]], device=device)
            found.append(model(input_ids=batch, use_cache=False).logits[0].float().cpu())
    return found


def difference(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> LogitDifference:
    """Compares logits position by position. A NaN in either is an infinite difference."""
    infinity = float("inf")
    largest = max(
        float((a - b).abs().nan_to_num(nan=infinity).max()) for a, b in zip(reference, other, strict=True)
    )
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(reference, other))
    scale = max(float(a.abs().max()) for a in reference)
    return LogitDifference(largest, scale, same / sum(len(a) for a in reference))


@torch.inference_mode()
def greedy(
    model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """New ids for each prompt, by transformers' own `generate`, one prompt at a time, as users call it.

    Args:
        settings: eos_token_id and pad_token_id, where the model's generation config is not to be used.
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


def free_memory() -> None:
    """Gives back what a dropped model held, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""NEFTune (Jain et al. 2023): uniform noise on the input embeddings while training.

The paper scales the noise of an example of L tokens and d dimensions by alpha / sqrt(L d). In a batch that
holds several examples in one sequence, or pads them, L is each example's own length: taken from the whole
sequence, as the hook of transformers does, the noise would be weaker by the square root of how many examples
share a block.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from sft_pipeline.training.data import Microbatch
from sft_pipeline.training.loss import causal_model


class EmbeddingNoise:
    """A forward hook of the input embeddings. `about` tells it which micro-batch comes next."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: torch.Tensor | None = None

    def about(self, microbatch: Microbatch) -> None:
        """The next forward pass is of this micro-batch."""
        self._lengths = example_lengths(microbatch)

    def __call__(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training or self._lengths is None:
            return output
        scale = self.alpha / (self._lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[..., None].to(output)


def example_lengths(microbatch: Microbatch) -> torch.Tensor:
    """float32 [B, T]: for each position the length of the example that it is in."""
    positions = microbatch.inputs.get("position_ids")
    if positions is None:
        lengths = microbatch.lengths
        if lengths is None:  # a rank without a share of the update, whose loss is of no token
            return torch.ones(microbatch.inputs["input_ids"].shape, device=microbatch.index.device)
        return lengths[:, None].expand(microbatch.inputs["input_ids"].shape).float()
    example = (positions.flatten() == 0).cumsum(0) - 1
    return torch.bincount(example)[example].view(positions.shape).float()


@contextlib.contextmanager
def embedding_noise(model: Any, alpha: float | None) -> Iterator[EmbeddingNoise | None]:
    """Adds the noise for the time of the context; None where no alpha is given."""
    if alpha is None:
        yield None
        return
    noise = EmbeddingNoise(alpha)
    handle = causal_model(model).get_input_embeddings().register_forward_hook(noise)
    try:
        yield noise
    finally:
        handle.remove()

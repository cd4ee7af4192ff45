"""NEFTune: the noise of each example is that of the paper, however examples are laid out."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from sft_pipeline.training.data import microbatches
from sft_pipeline.training.neftune import embedding_noise
from sft_pipeline.training.shards import Block
from sft_pipeline_tests.training import tiny

ALPHA, LENGTHS = 5.0, ((40, 8, 3), (21,))


def blocks() -> list[Block]:
    found = []
    for number, lengths in enumerate(LENGTHS):
        ids = np.arange(3, 3 + sum(lengths)).astype(np.int32)
        positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        found.append(Block(number, ids, ids.copy(), positions, np.array(lengths, dtype=np.int32)))
    return found


@pytest.mark.parametrize("layout", ["packed", "flat", "rows"])
def test_each_example_has_the_noise_of_its_own_length(layout):
    model = tiny.llama(tie=False, hidden=64).train()
    embeddings, found = model.get_input_embeddings(), {}
    with embedding_noise(model, ALPHA) as noise:
        for m in microbatches(blocks(), layout=layout, per_device_batch=2, max_tokens=100):
            clean = embeddings.weight[m.inputs["input_ids"]]
            noise.about(m)
            off = (embeddings(m.inputs["input_ids"]) - clean).detach()
            positions = m.inputs.get("position_ids")
            flat = off.reshape(-1, off.shape[-1]).abs().amax(-1)
            if positions is None:
                for row, length in zip(off, m.lengths.tolist(), strict=True):
                    found[length] = float(row[:length].abs().max())
            else:
                starts = [*torch.nonzero(positions.flatten() == 0)[:, 0].tolist(), positions.numel()]
                for start, end in pairwise(starts):
                    found[end - start] = float(flat[start:end].max())
    for length in (n for lengths in LENGTHS for n in lengths):
        bound = ALPHA / math.sqrt(length * 64)  # alpha / sqrt(L d); the largest of many draws is near it
        assert 0.97 * bound < found[length] <= bound * (1 + 1e-4), (layout, length)


def test_no_noise_without_alpha_in_evaluation_or_afterwards():
    model = tiny.llama()
    (m,) = microbatches(blocks()[1:], layout="packed", per_device_batch=1, max_tokens=100)
    ids = m.inputs["input_ids"]
    embeddings = model.get_input_embeddings()
    clean = embeddings.weight[ids]
    with embedding_noise(model, None) as noise:
        assert noise is None and torch.equal(embeddings(ids), clean)
    with embedding_noise(model, ALPHA) as noise:
        noise.about(m)
        assert torch.equal(model.eval().get_input_embeddings()(ids), clean)
        assert not torch.equal(model.train().get_input_embeddings()(ids), clean)
    assert torch.equal(embeddings(ids), clean)

"""The boundary probe catches leaks, and names them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sft_pipeline.stages.sanity_check.probe import collate_as, joined, probe, probe_block
from sft_pipeline.training.shards import Shards
from sft_pipeline_tests.training import tiny


@pytest.fixture
def block(tmp_path):
    return probe_block(Shards(tiny.packed_shards(tmp_path).parts("train")))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_a_sound_model_and_collator_pass_on_every_attention_path(block, attention, layout):
    found = probe(tiny.llama(attention=attention), block, layout, collate_as(layout))
    assert found.passed and found.cause is None
    n = len(block.lengths)
    assert all(found.moved[i][j] == 0 for i in range(n) for j in range(n) if i != j)
    assert all(found.moved[i][i] > 1e-3 for i in range(n)), (
        "changing an example must change its own predictions"
    )
    assert all(found.gradient[i][j] == 0 for i in range(n) for j in range(n) if i != j)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_second_of_two_packed_segments_of_three_cannot_see_the_first(attention):
    """Worked example: position ids 0 1 2 0 1 2."""
    block = joined([np.array([5, 6, 7]), np.array([8, 9, 10])])
    [m] = collate_as("packed")([block])
    assert m.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    found = probe(tiny.llama(attention=attention), block, "packed", collate_as("packed"))
    assert found.passed and found.moved[0][1] == 0 and found.gradient[0][1] == 0


def test_adapters_qwen_and_the_training_mode_pass_and_are_left_as_they_were(block):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny.qwen(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()
    assert probe(model, block, "packed", collate_as("packed")).passed
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_mask_beside_the_position_ids_is_caught_and_named(block):
    def masked(blocks):
        return [
            replace(m, inputs={**m.inputs, "attention_mask": torch.ones_like(m.inputs["input_ids"])})
            for m in collate_as("packed")(blocks)
        ]

    found = probe(tiny.llama(), block, "packed", masked)
    assert (
        not found.passed
        and "attention mask is passed beside the position ids" in found.cause
        and "attention_mask" in found.remedy
    )
    assert found.moved[0][1] > 1e-3 and found.gradient[0][1] > 1e-3 and found.rows()


def test_wrapped_packing_without_positions_is_caught_and_named(block):
    def wrapped(blocks):
        return [replace(m, inputs={"input_ids": m.inputs["input_ids"]}) for m in collate_as("packed")(blocks)]

    found = probe(tiny.llama(), block, "packed", wrapped)
    assert not found.passed and "no position ids" in found.cause


def test_a_state_space_model_is_caught_and_named_when_packed_and_passes_unpacked(block):
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()
    found = probe(model, block, "packed", collate_as("packed"))
    assert not found.passed and "state-space" in found.cause and found.remedy == "set packing.strategy: none"
    assert probe(model, block, "rows", collate_as("rows")).passed


def test_a_family_that_does_not_read_positions_as_boundaries_is_caught(block):
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            word_embed_proj_dim=32,
        )
    ).eval()
    found = probe(model, block, "packed", collate_as("packed"))
    assert not found.passed and "packing.strategy" in found.remedy


def test_one_example_has_no_boundary_to_probe(tmp_path):
    tiny.write_parquet(tmp_path / "p.parquet", tiny.pack(tiny.examples(1), 64), tiny.PACKED)
    assert probe_block(Shards([tmp_path / "p.parquet"])) is None

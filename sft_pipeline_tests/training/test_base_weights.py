"""A base whose files hold other tensors than its architecture has is refused by name at every load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft_pipeline.errors import InputError
from sft_pipeline.training.base_weights import check_base
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.model import load_for_inference, load_for_training
from sft_pipeline_tests.training import tiny
from sft_pipeline_tests.training.reference import cohere, gemma, granite

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1.mlp.up_proj.weight"


def base(folder: Path, change: Callable[[Tensors], Tensors] | None = None, **model: object) -> ModelConfig:
    tiny.base_folder(folder, model=tiny.llama(**model))  # type: ignore[arg-type]
    if change:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return ModelConfig(base=str(folder), parameterization="full")


CHANGED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a layer is missing": (lambda t: {k: v for k, v in t.items() if "layers.1." not in k}, "layers.1.input"),
    "one tensor is missing": (lambda t: {k: v for k, v in t.items() if k != LAYER}, LAYER),
    "a wrapper's prefix": (lambda t: {f"module.{k}": v for k, v in t.items()}, "module.model."),
    "a head of another task": (lambda t: {**t, "score.weight": torch.zeros(2, 32)}, "score.weight"),
    "one layer more": (lambda t: {**t, LAYER.replace("1", "2"): t[LAYER].clone()}, "layers.2."),
    "another shape": (lambda t: {**t, LAYER: t[LAYER][:-1].clone()}, "up_proj"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_other_tensors_are_named_before_a_weight_is_read_and_at_every_load(tmp_path, kind):
    change, named = CHANGED[kind]
    config = base(tmp_path / "base", change)
    for load in (
        lambda: check_base(config),
        lambda: load_for_training(config, TrainingConfig()),
        lambda: load_for_inference(config),
    ):
        with pytest.raises(InputError, match=r"model\.base") as refused:
            load()
        assert named in str(refused.value)


@pytest.mark.parametrize("tie", [True, False])
def test_a_whole_base_is_accepted(tmp_path, tie):
    config = base(tmp_path / "base", tie=tie)
    check_base(config)
    load_for_training(config, TrainingConfig())


@pytest.mark.parametrize("model", [tiny.qwen, gemma, cohere, granite])
def test_other_families_are_accepted(tmp_path, model):
    tiny.base_folder(tmp_path / "base", model=model())
    check_base(ModelConfig(base=str(tmp_path / "base")))


def test_an_adapter_beside_the_base_is_refused(tmp_path):
    config = base(tmp_path / "base")
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match=r"adapter_config\.json beside config\.json"):
        check_base(config)


@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_on_embeddings_that_are_the_output_layer_too_is_refused(tmp_path, tie):
    base(tmp_path / "base", tie=tie)
    lora = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    config = ModelConfig(base=str(tmp_path / "base"), parameterization="lora", lora=lora)
    if tie:
        with pytest.raises(InputError, match="shares with its output layer"):
            load_for_training(config, TrainingConfig())
    else:
        load_for_training(config, TrainingConfig())

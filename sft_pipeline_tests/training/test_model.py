"""Loading says what it loads, and refuses clearly."""

import json

import pytest
import torch

from sft_pipeline import bounded
from sft_pipeline.errors import InputError
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.memory import estimate, weight_shapes
from sft_pipeline.training.model import (
    count_parameters,
    load_base,
    load_for_inference,
    load_for_training,
    resolve_precision,
    save_weights,
)
from sft_pipeline_tests.training import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp("models") / "base", model=tiny.llama(tie=False))


@pytest.mark.parametrize(
    "config,words",
    [
        ({"base": "no/such/folder/anywhere"}, "does not exist, and this is no hub id"),
        ({"base": "nobody/nothing"}, "pin it to a commit"),
    ],
)
def test_an_unknown_base_is_one_clear_message(config, words):
    for load in (load_for_inference, lambda c: load_for_training(c, TrainingConfig())):
        with pytest.raises(InputError, match=words):
            load(ModelConfig(**config))


def test_an_unreachable_hub_and_a_folder_without_a_model_are_input_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_for_inference(ModelConfig(base="nobody/nothing", revision="0" * 40))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_for_inference(ModelConfig(base=str(tmp_path / "empty")))
    (tmp_path / "pickled").mkdir()
    tiny.llama().config.save_pretrained(tmp_path / "pickled")
    torch.save(tiny.llama().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_for_inference(ModelConfig(base=str(tmp_path / "pickled")))


def test_what_is_asked_for_is_what_runs(base):
    model, report = load_for_training(ModelConfig(base=str(base), attention="eager"), TrainingConfig())
    assert (
        report.attention == "eager"
        and report.precision == "fp32"
        and report.device == "cpu"
        and report.parameterization == "lora"
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    with pytest.raises(InputError, match="flash_attention_2"):
        load_base(ModelConfig(base=str(base), attention="flash_attention_2"), dtype=torch.float32, device=CPU)
    with pytest.raises(InputError, match="flex_attention has no gradients on a CPU"):
        load_for_training(
            ModelConfig(base=str(base), attention="flex_attention"), TrainingConfig(), device=CPU
        )
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        resolve_precision("fp16", CPU)


def test_freezing_by_pattern_and_its_mistakes(base, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    config = ModelConfig(base=str(base), parameterization="full", freeze=["embed_tokens", r"layers\.0\."])
    model, report = load_for_training(config, TrainingConfig())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert "model.embed_tokens.weight" in frozen and all("embed" in n or "layers.0." in n for n in frozen)
    assert 0 < report.trainable_parameters < report.total_parameters
    for freeze, words in (
        (["nothing_like_it"], "matches no parameter"),
        (["("], "not a regular expression"),
        ([r"^(\w+\.?)+$!"], r'model.freeze ".*" did not finish'),
        ([""], "leaves nothing to train"),
    ):
        with pytest.raises(InputError, match=words):
            load_for_training(config.model_copy(update={"freeze": freeze}), TrainingConfig())


def test_target_modules_that_do_not_finish_are_named(base, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    for config in (
        ModelConfig(base=str(base), lora={"target_modules": r"(\w+\.?)+!"}),
        ModelConfig(base=str(base), parameterization="full", freeze=[r"^(\w+\.?)+$!"]),
    ):
        with pytest.raises(InputError, match=r'model\.(lora\.target_modules|freeze) ".*" did not finish'):
            estimate(config, TrainingConfig(), tokens=64, gpu=False)
        with pytest.raises(InputError, match=r'model\.(lora\.target_modules|freeze) ".*" did not finish'):
            load_for_training(config, TrainingConfig())


@pytest.mark.parametrize(
    "targets,words", [(["no_such_module"], "target_modules"), (["lm_head", "q_proj"], "output layer")]
)
def test_adapters_on_nothing_or_on_the_head_are_refused(base, targets, words):
    with pytest.raises(InputError, match=words):
        load_for_training(ModelConfig(base=str(base), lora={"target_modules": targets}), TrainingConfig())


def test_saved_adapters_name_the_base_as_the_recipe_does_and_have_stable_bytes(base, tmp_path):
    config = ModelConfig(base=str(base))
    for name in ("a", "b"):
        model, _ = load_for_training(config, TrainingConfig())
        save_weights(model, tmp_path / name, config.model_copy(update={"base": "data/base_model"}))
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "data/base_model"
    )


def test_an_evaluation_does_not_change_four_bit_weights(base):
    pytest.importorskip("bitsandbytes")
    model, report = load_for_training(ModelConfig(base=str(base), parameterization="qlora"), TrainingConfig())
    assert report.weights_dtype == "nf4"
    ids = torch.tensor([[1, 5, 6, 7]])
    model.train()
    with torch.no_grad():
        before = model(ids).logits
        model.eval()
        model(ids)
        model.eval()
        assert torch.equal(model(ids).logits, before) or torch.allclose(model(ids).logits, before, atol=1e-6)


@pytest.mark.parametrize("parameterization", ["full", "lora", "qlora"])
def test_the_estimate_counts_parameters_as_the_loaded_model_has_them(base, parameterization):
    config = ModelConfig(base=str(base), parameterization=parameterization, lora={"r": 4})
    found = estimate(config, TrainingConfig(), tokens=1024)
    model = load_for_training(
        ModelConfig(base=str(base), parameterization=parameterization, lora={"r": 4}), TrainingConfig()
    )[0]
    assert (found.parameters, found.trainable) == count_parameters(model)
    assert found.optimizer == 8 * found.trainable and found.total > found.weights > 0


def test_the_estimate_grows_with_tokens_and_shrinks_with_checkpointing(base):
    config = ModelConfig(base=str(base))
    small, large = (estimate(config, TrainingConfig(), tokens=n) for n in (1024, 4096))
    assert large.activations == 4 * small.activations
    assert (
        estimate(config, TrainingConfig(gradient_checkpointing=True), tokens=4096).activations
        < large.activations
    )
    assert (
        sum(a * b if len(s) == 2 else a for s in weight_shapes(base).values() for a, b in [(s[0], s[-1])])
        == small.parameters - small.trainable
    )


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_no_emulated_bf16(monkeypatch, has_bf16, expected):
    """torch counts emulation as support: a T4 or V100 would train in it at a fraction of its speed."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    gpu = torch.device("cuda", 0)
    assert resolve_precision("auto", gpu) == expected
    if not has_bf16:
        with pytest.raises(InputError, match="no bfloat16"):
            resolve_precision("bf16", gpu)

"""What adapters are refused on, before any weight is read, and in which words."""

import json

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.training.base import base_folder
from sft_pipeline.training.base_weights import check_base
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.model import load_for_training
from sft_pipeline_tests.training import tiny
from sft_pipeline_tests.training.families import FAMILIES


def base_of(folder, family):
    return tiny.base_folder(folder / family, model=FAMILIES[family](tiny.VOCABULARY))


@pytest.mark.parametrize("family", ["mixtral-experts", "qwen3-experts", "olmoe-experts", "deepseek-experts"])
@pytest.mark.parametrize("how", ["lora", "qlora"])
def test_dropout_on_experts_of_one_tensor_is_named_as_the_reason(tmp_path, family, how):
    model = ModelConfig(base=str(base_of(tmp_path, family)), parameterization=how, lora={"dropout": 0.05})
    with pytest.raises(InputError, match=r"experts.*Set model\.lora\.dropout to 0"):
        check_base(model)
    check_base(model.model_copy(update={"lora": model.lora.model_copy(update={"dropout": 0.0})}))


def test_a_router_that_is_a_linear_layer_is_left_out_and_refused_where_it_is_asked_for(tmp_path):
    base = str(base_of(tmp_path, "llama4-experts"))
    model, _ = load_for_training(ModelConfig(base=base), TrainingConfig())
    adapted = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if ".lora_A" in n}
    assert len(adapted) == 14 and not any("router" in name for name in adapted)
    for how in ("lora", "qlora"):
        asked = ModelConfig(base=base, parameterization=how, lora={"target_modules": ["q_proj", "router"]})
        with pytest.raises(InputError, match="router"):
            check_base(asked)


@pytest.mark.parametrize("how", ["full", "lora", "qlora"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "fp8", "mxfp4", None])
def test_a_base_that_is_quantized_is_refused_whatever_is_trained_of_it(tmp_path, how, nested, method):
    base = tiny.base_folder(tmp_path / "base")
    path = base / "config.json"
    described = json.loads(path.read_text())
    quantization = {"quantization_config": {"quant_method": method, "bits": 4}}
    described |= {"text_config": quantization} if nested else quantization
    path.write_text(json.dumps(described))
    with pytest.raises(
        InputError, match=rf"already quantized \({method or 'by an unnamed method'}\).*qlora quantizes it"
    ):
        base_folder(ModelConfig(base=str(base), parameterization=how))


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_base_saved_by_bitsandbytes_is_refused(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tiny.base_folder(tmp_path / "base")
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**{bits: True})
    )
    quantized.save_pretrained(tmp_path / "quantized")
    with pytest.raises(InputError, match=r"already quantized \(bitsandbytes\)"):
        check_base(ModelConfig(base=str(tmp_path / "quantized")))


@pytest.mark.parametrize("content", ["[]", "3", '"llama"', "null"])
def test_a_config_that_is_no_object_is_one_message(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
        base_folder(ModelConfig(base=str(tmp_path)))

"""Settings of other trainers become a recipe that loads; what is not taken over is said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_pipeline.config.foreign_names import DONE_OTHERWISE, KEYS
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline_tests.command import sft
from sft_pipeline_tests.config.every_key import leaves

AXOLOTL = """
base_model: some/model
load_in_4bit: true
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 2e-4
lr_scheduler: cosine
bf16: auto
warmup_steps: 10
val_set_size: 0.05
output_dir: ./out
a_key_of_tomorrow: 1
"""
LLAMA_FACTORY = """
model_name_or_path: some/model
stage: sft
finetuning_type: lora
lora_target: all
lora_rank: 8
cutoff_len: 2048
template: qwen3
per_device_train_batch_size: 1
num_train_epochs: 3.0
learning_rate: 1.0e-4
warmup_ratio: 0.1
bf16: true
"""
SCRIPT = """
import os
from trl import SFTConfig, SFTTrainer
from peft import LoraConfig
args = SFTConfig(output_dir="x", max_length=1024, num_train_epochs=2, learning_rate=1e-4, packing=False,
                 assistant_only_loss=True, seed=int(os.environ["SEED"]), max_steps=-1)
peft = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
model = AutoModelForCausalLM.from_pretrained("some/model")
"""
COMMAND = """
accelerate launch sft.py \\
  --model_name_or_path some/model --learning-rate 3e-5 --use_peft \\
  --per_device_train_batch_size=8 --gradient_checkpointing --eval_strategy steps  # a comment
"""


def imported(folder: Path, name: str, text: str, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    (folder / name).write_text(text)
    made = sft("import", str(folder / name), "--into", str(folder), "--json", *options, home=folder / "home")
    assert made.code == 0 and made.json, made.stderr
    recipe = yaml.safe_load(Path(made.json["recipe"]).read_text())
    RecipeConfig.model_validate(recipe)
    return recipe, made.json


def test_axolotl(tmp_path: Path) -> None:
    recipe, said = imported(tmp_path, "qlora-7b.yml", AXOLOTL, "--dataset", "mine")
    assert recipe["name"] == "qlora_7b" and recipe["dataset"] == "mine"
    lora = {"r": 32, "alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert recipe["model"] == {"base": "some/model", "parameterization": "qlora", "lora": lora}
    assert recipe["tokens"] == {"max_length": 4096} and recipe["packing"] == {"strategy": "bfd"}
    assert recipe["training"] == {
        "per_device_batch": 2,
        "gradient_accumulation": 4,
        "epochs": 3,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "precision": "auto",
    }
    assert set(said["unmapped"]) == {"warmup_steps", "val_set_size", "output_dir", "a_key_of_tomorrow"}
    assert "split.validation of the dataset file" in said["unmapped"]["val_set_size"]


def test_llama_factory(tmp_path: Path) -> None:
    recipe, said = imported(tmp_path, "lora.yaml", LLAMA_FACTORY)
    assert recipe["model"]["lora"] == {"target_modules": "all-linear", "r": 8}
    assert recipe["training"]["precision"] == "bf16" and recipe["training"]["warmup"] == 0.1
    assert set(said["unmapped"]) == {"stage", "template"}


def test_a_script_is_read_and_not_executed(tmp_path: Path) -> None:
    recipe, said = imported(tmp_path, "train.py", SCRIPT)
    assert recipe["model"]["base"] == "some/model" and recipe["model"]["lora"]["r"] == 64
    assert recipe["tokens"] == {"max_length": 1024, "supervise": "assistant"}
    assert recipe["packing"] == {"strategy": "none"}
    assert said["unmapped"]["seed"] == "computed in the script" and "max_steps" in said["unmapped"]


def test_a_command_line(tmp_path: Path) -> None:
    recipe, said = imported(tmp_path, "run.sh", COMMAND)
    assert recipe["training"] == {
        "learning_rate": 3e-5,
        "per_device_batch": 8,
        "gradient_checkpointing": True,
    }
    assert set(said["unmapped"]) == {"use_peft", "eval_strategy"}


@pytest.mark.parametrize("text", ["", "no settings", "x: [", "--", "learning_rate: high\n"])
def test_what_cannot_be_imported_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    made = sft("import", str(tmp_path / "x.yaml"), "--into", str(tmp_path), home=tmp_path / "home")
    assert made.code == 2 and str(tmp_path / "x.yaml") in made.stderr
    assert not (tmp_path / "recipes").exists()


def test_every_name_leads_to_a_key_that_is_there() -> None:
    known = set(leaves(RecipeConfig))
    assert {ours for ours in KEYS.values() if not ours.startswith("split.")} <= known
    assert not KEYS.keys() & DONE_OTHERWISE.keys()


@pytest.mark.parametrize(
    ("key", "said"),
    [("lr", "training.learning_rate"), ("max_seq_length", "tokens.max_length"), ("output_dir", "SFT_HOME")],
)
def test_a_foreign_name_in_a_recipe_is_answered(tmp_path: Path, key: str, said: str) -> None:
    (tmp_path / "recipes").mkdir()
    text = f"name: mine\ndataset: access_policy\nmodel: {{base: data/base_model}}\ntraining: {{{key}: 1}}\n"
    (tmp_path / "recipes" / "mine.yaml").write_text(text)
    ran = sft("check", "mine", home=tmp_path / "home", config=tmp_path)
    assert ran.code == 2 and said in ran.stderr

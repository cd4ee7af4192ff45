"""Real rows, a real base model with its own tokenizer, and real tokenizers of other families."""

import json
from pathlib import Path

import pytest
import yaml

from sft_pipeline_tests.command import sft


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gsm8k")


@pytest.fixture(scope="module")
def config(home: Path, shared_data: Path) -> Path:
    """A GSM8K dataset file and recipe: columns mapped, graded by the number after `####`."""
    dataset = {
        "name": "gsm8k",
        "sources": [
            {
                "path": str(shared_data / "gsm8k" / "train.jsonl"),
                "static": True,
                "columns": {"prompt": "question", "completion": "answer"},
            }
        ],
        "contract": {"max_reject_rate": 0.1},
        "split": {"validation": 0.02, "test": 0.02},
    }
    recipe = {
        "name": "gsm8k_full",
        "dataset": "gsm8k",
        "model": {"base": str(shared_data / "models" / "stories260K"), "parameterization": "full"},
        "template": {"chat_template": "plain"},
        "tokens": {"max_length": 512, "overflow": "reject"},
        "sanity": {"short_run_steps": 5},
        "training": {"max_steps": 30, "eval_steps": 15, "learning_rate": 1e-3, "per_device_batch": 4},
        "evaluation": {
            "graders": [{"name": "answer_pass_rate", "kind": "numeric_answer", "after": "####"}],
            "rank_by": ["answer_pass_rate", "-val_loss"],
            "max_rows": 12,
            "max_new_tokens": 48,
        },
    }
    for kind, value in (("datasets", dataset), ("recipes", recipe)):
        (home / kind).mkdir()
        (home / kind / f"{value['name']}.yaml").write_text(yaml.safe_dump(value))
    return home


def test_the_improvement_check_blocks_honestly(config: Path, home: Path) -> None:
    ran = sft("run", "gsm8k_full", "--json", home=home / "sft", config=config)
    assert ran.code == 3, ran.stderr[-4000:]
    assert ran.json["status"] == "blocked"
    failed = [c for c in ran.json["checks"] if c["blocking"] and not c["passed"]]
    assert [(c["asset"], c["name"]) for c in failed] == [("evaluation", "improvement")]
    assert "answer_pass_rate" in failed[0]["description"]
    assert ran.json["exported_model"] is None and "exported_model" not in ran.json["artifacts"]
    counts = json.loads(Path(ran.json["artifacts"]["validated_rows"], "manifest.json").read_text())["counts"]
    assert counts["accepted"] + counts["quarantined"] == 7473


def test_without_the_requirement_it_exports(config: Path, home: Path) -> None:
    ran = sft(
        "run",
        "gsm8k_full",
        "--json",
        "--set",
        "evaluation.require_improvement=false",
        home=home / "sft",
        config=config,
    )
    assert ran.code == 0, ran.stderr[-4000:]
    assert ran.json["status"] == "exported"
    assert "trained_checkpoints" in ran.json["cached"]
    assert Path(ran.json["exported_model"], "merged", "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_other_tokenizers_reach_packed_shards(config: Path, home: Path, shared_data: Path, name: str) -> None:
    ran = sft(
        "run",
        "gsm8k_full",
        "--json",
        "--until",
        "packed_shards",
        "--set",
        f"model.tokenizer={shared_data / 'tokenizers' / name}",
        "--set",
        "template.chat_template=tokenizer",
        home=home / "sft",
        config=config,
    )
    assert ran.code == 0, ran.stderr[-4000:]
    assert ran.json["cached"] == ["raw_rows", "validated_rows", "grouped_split"]
    counts = json.loads(Path(ran.json["artifacts"]["packed_shards"], "manifest.json").read_text())["counts"]
    assert counts["blocks"] > 100

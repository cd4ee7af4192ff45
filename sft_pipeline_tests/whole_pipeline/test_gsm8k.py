"""Real rows, a real base model with its own tokenizer, and real tokenizers of other families."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_pipeline_tests.command import Ran, sft, sft_process

pytestmark = pytest.mark.shared_data
ROWS = 7473


@dataclass(frozen=True)
class Gsm8k:
    """GSM8K as a dataset with mapped columns and a recipe graded by the number after `####`."""

    folder: Path
    rows: int

    def run(self, *arguments: str) -> Ran:
        """In this process; the model stages too."""
        return sft("run", "gsm8k_full", "--json", *arguments, home=self.folder / "sft", config=self.folder)

    def manifest(self, ran: Ran, name: str) -> dict[str, Any]:
        return json.loads(Path(ran.json["artifacts"][name], "manifest.json").read_text())


def write(folder: Path, source: Path, shared_data: Path, rows: int) -> Gsm8k:
    dataset = {
        "name": "gsm8k",
        "sources": [
            {"path": str(source), "static": True, "columns": {"prompt": "question", "completion": "answer"}}
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
        (folder / kind).mkdir()
        (folder / kind / f"{value['name']}.yaml").write_text(yaml.safe_dump(value))
    return Gsm8k(folder, rows)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Gsm8k:
    """The first 300 rows."""
    folder = tmp_path_factory.mktemp("gsm8k-few")
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as lines:
        (folder / "train.jsonl").write_text("".join(islice(lines, 300)), encoding="utf-8")
    return write(folder, folder / "train.jsonl", shared_data, 300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Gsm8k:
    """All rows."""
    folder = tmp_path_factory.mktemp("gsm8k")
    return write(folder, shared_data / "gsm8k" / "train.jsonl", shared_data, ROWS)


def check_tokenizer(gsm8k: Gsm8k, shared_data: Path, name: str) -> None:
    """The branch's own tokenizer first; with another one, only what reads the tokenizer is built again."""
    first = gsm8k.run("--until", "packed_shards")
    assert first.code == 0, first.stderr[-4000:]
    ran = gsm8k.run(
        "--until",
        "packed_shards",
        "--set",
        f"model.tokenizer={shared_data / 'tokenizers' / name}",
        "--set",
        "template.chat_template=tokenizer",
    )
    assert ran.code == 0, ran.stderr[-4000:]
    assert ran.json["cached"] == ["raw_rows", "validated_rows", "grouped_split"]
    validated = gsm8k.manifest(ran, "validated_rows")["counts"]
    assert validated["accepted"] + validated["quarantined"] == gsm8k.rows
    tokenized = gsm8k.manifest(ran, "tokenized_rows")["counts"]
    assert tokenized["rows_accepted"] > 0.95 * validated["accepted"]
    packed = gsm8k.manifest(ran, "packed_shards")["counts"]
    assert packed["rows_packed"] == tokenized["train"] + tokenized["validation"]
    assert packed["blocks"] >= packed["tokens"] / 512 > 10


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_other_tokenizers_reach_packed_shards(few: Gsm8k, shared_data: Path, name: str) -> None:
    check_tokenizer(few, shared_data, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_other_tokenizers_reach_packed_shards_with_all_rows(
    whole: Gsm8k, shared_data: Path, name: str
) -> None:
    check_tokenizer(whole, shared_data, name)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_improvement_check_blocks_honestly_and_without_the_requirement_it_exports(whole: Gsm8k) -> None:
    ran = sft_process("run", "gsm8k_full", "--json", home=whole.folder / "sft", config=whole.folder)
    assert ran.code == 3, ran.stderr[-4000:]
    assert ran.json["status"] == "blocked"
    failed = [c for c in ran.json["checks"] if c["blocking"] and not c["passed"]]
    assert [(c["asset"], c["name"]) for c in failed] == [("evaluation", "improvement")]
    assert "answer_pass_rate" in failed[0]["description"]
    assert ran.json["exported_model"] is None and "exported_model" not in ran.json["artifacts"]
    exported = whole.run("--set", "evaluation.require_improvement=false")
    assert exported.code == 0, exported.stderr[-4000:]
    assert exported.json["status"] == "exported"
    assert "trained_checkpoints" in exported.json["cached"]
    assert Path(exported.json["exported_model"], "merged", "model.safetensors").is_file()

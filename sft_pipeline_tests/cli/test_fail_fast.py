"""What would fail at the end fails before any data is built."""

import json
import shutil
from pathlib import Path

import pytest

from sft_pipeline_tests.branches import SHORT, write_branch
from sft_pipeline_tests.command import ROOT, sft

CASES = {
    "tokens.max_length=100000": "positions",
    "template.chat_template=nowhere.jinja": "readable Jinja file",
    "model.base=nowhere/at/all": "model.base",
    "training.report_to=[no_such_reporter]": "no_such_reporter",
    "model.tokenizer=data": "tokenizer",
}


@pytest.mark.parametrize("override", CASES)
def test_before_any_data_is_built(tmp_path: Path, override: str) -> None:
    config, home = write_branch(tmp_path / "config", recipe=SHORT), tmp_path / "home"
    ran = sft("run", "small_lora", "--set", override, home=home, config=config)
    assert ran.code == 2 and CASES[override] in ran.stderr, ran.stderr
    assert not (home / "objects").exists()


def test_a_vocabulary_that_is_too_large_for_the_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(ROOT / "data" / "base_model", base)
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"vocab_size": 100}))
    config, home = write_branch(tmp_path / "config", recipe=SHORT), tmp_path / "home"
    ran = sft("run", "small_lora", "--set", f"model.base={base}", home=home, config=config)
    assert ran.code == 2 and "ids would fall outside" in ran.stderr and not (home / "objects").exists()


def test_data_stages_run_with_any_model(tmp_path: Path) -> None:
    config, home = write_branch(tmp_path / "config", recipe=SHORT), tmp_path / "home"
    long = ("--set", "tokens.max_length=100000", "--until", "packed_shards")
    assert sft("run", "small_lora", *long, home=home, config=config).code == 0

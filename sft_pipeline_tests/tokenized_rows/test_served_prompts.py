"""What is lost between the source file and the tokens fails a check, whoever lost it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.tokenized_rows.asset import STAGE as TOKENIZED_ROWS
from sft_pipeline.stages.validated_rows import validate
from sft_pipeline.store import Artifact, Store
from sft_pipeline.tables.parquet import read_rows
from sft_pipeline.text.tokenizer import load_tokenizer
from sft_pipeline_tests import dataset_runs
from sft_pipeline_tests.text.tiny import save_tokenizer

TEMPLATE = """\
{%- for m in messages -%}
<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor -%}
{%- if tools is not none %}{{ tools | tojson }}{% endif -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = {"name": "find", "arguments": {"when": "Friday", "guests": 4}}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "name": "find", "content": f"result {i}"},
            {"role": "assistant", "reasoning_content": f"thought {i}", "content": f"answer {i}"},
        ]
    }
    for i in range(40)
]


def tokenized(
    folder: Path,
    jinja: str = TEMPLATE,
    rows: Sequence[dict[str, Any]] = ROWS,
    format: str = "messages",
    **recipe: Any,
) -> Artifact:
    """tokenized_rows of the rows, with everything before it."""
    source = dataset_runs.write_jsonl(folder / "rows.jsonl", rows)
    split = {"validation": 0.1, "test": 0.1, "near_duplicates": None}
    dataset = dataset_runs.dataset({"path": str(source), "format": format}, split=split)
    home = folder / "home"
    dataset_runs.run(dataset, home)
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        save_tokenizer(tokenizer, jinja)
    values = {"name": "r", "dataset": "rows", "model": {"base": str(tokenizer)}, **recipe}
    branch = Branch(dataset, dataset_runs.snapshots(dataset.sources)[-1], RecipeConfig.model_validate(values))
    stages = {**dataset_runs.STAGES, TOKENIZED_ROWS.name: TOKENIZED_ROWS}
    return run_stage(TOKENIZED_ROWS, stages, branch, Run(Store(home), Reporter())).artifact


def check(artifact: Artifact, name: str) -> dict[str, Any]:
    return next(c for c in artifact.manifest.checks if c["name"] == name)


def test_rows_of_every_shape_are_compared_with_their_source_and_with_transformers(tmp_path: Path) -> None:
    found = tokenized(tmp_path)
    assert found.manifest.accepted and found.manifest.counts["rows_accepted"] == 40
    description = check(found, "served_prompt_equal")["description"]
    assert description.startswith("40 rows rendered again from their source files")
    assert "40 of them by transformers" in description


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda message: {**message, name: None}


def _sorted_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message["tool_calls"]
    return {**message, "tool_calls": calls and json.dumps(json.loads(calls), sort_keys=True)}


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (_without("reasoning_content"), "reasoning_content of the final message"),
        (_without("name"), "the source row gives"),
        (_without("tool_calls"), "the source row gives"),
        (_sorted_calls, "the source row gives"),
        (lambda m: {**m, "content": m["content"].upper()}, "the source row gives"),
    ],
    ids=["reasoning", "name", "calls", "order of arguments", "content"],
)
def test_what_validation_loses_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable, named: str
) -> None:
    normalize = validate.normalize

    def losing(*arguments: Any) -> Any:
        row = normalize(*arguments)
        row.messages = [lose(message) for message in row.messages]
        return row

    monkeypatch.setattr(validate, "normalize", losing)
    monkeypatch.setattr(validate, "check_contract", lambda *_: None)
    monkeypatch.setenv("SFT_WORKERS", "1")
    failed = check(tokenized(tmp_path), "served_prompt_equal")
    assert not failed["passed"] and failed["blocking"]
    assert "rows.jsonl:" in failed["description"] and named in failed["description"]


def test_a_template_with_a_clock_is_compared(tmp_path: Path) -> None:
    found = tokenized(tmp_path, "{{ strftime_now('%d %B %Y') }}" + TEMPLATE)
    assert found.manifest.accepted
    assert "40 of them by transformers" in check(found, "served_prompt_equal")["description"]


AS_SERVED = (
    "import sys; from transformers import AutoTokenizer; "
    "AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
)


@pytest.mark.shared_data
def test_an_architecture_that_forces_another_tokenizer_class_is_refused(
    tmp_path: Path, shared_data: Path
) -> None:
    """GPT-2 keeps numbers together, and transformers' class for Qwen2 splits them, whatever the files say."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(shared_data / "tokenizers" / "gpt2", tokenizer)
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    assert tokenized(tmp_path).manifest.accepted
    (tokenizer / "config.json").write_text('{"model_type": "qwen2"}')
    shutil.rmtree(tmp_path / "home")
    failed = check(tokenized(tmp_path), "served_prompt_equal")
    assert not failed["passed"] and "model.tokenizer" in failed["description"]
    # The remedy that it names.
    ran = subprocess.run(
        [sys.executable, "-c", AS_SERVED, str(tokenizer), str(tmp_path / "as_served")],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    (tmp_path / "as_served" / "config.json").write_text('{"model_type": "qwen2"}')
    shutil.rmtree(tmp_path / "home")
    again = tokenized(tmp_path, model={"base": str(tokenizer), "tokenizer": str(tmp_path / "as_served")})
    assert check(again, "served_prompt_equal")["passed"], check(again, "served_prompt_equal")


def test_the_input_of_an_instruction_has_the_section_of_alpaca_s_published_form(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"Sort the numbers {i}.", "input": f"3 1 {i}", "output": f"1 3 {i}"}
        for i in range(40)
    ]
    rows += [{"instruction": f"Count {i}.", "input": "", "output": f"{i}"} for i in range(20)]
    found = tokenized(tmp_path, TEMPLATE, rows, "instruction", template={"chat_template": "alpaca"})
    assert found.manifest.accepted, [c for c in found.manifest.checks if not c["passed"]]
    assert check(found, "served_prompt_equal")["description"].startswith("60 rows rendered again")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    texts = {
        tokenizer.decode(row["input_ids"])
        for split in ("train", "validation", "test")
        for row in read_rows(found.parts(split))
    }
    end = tokenizer.special["eos_token"]
    asked = "### Instruction:\nSort the numbers 7.\n\n### Input:\n3 1 7\n\n### Output:\n1 3 7" + end
    assert any(asked in text for text in texts)
    assert any(f"### Instruction:\nCount 7.\n\n### Output:\n7{end}" in text for text in texts)


def test_an_input_under_another_template_stands_below_the_instruction(tmp_path: Path) -> None:
    rows = [{"instruction": f"Sort {i}.", "input": f"3 1 {i}", "output": f"1 3 {i}"} for i in range(40)]
    found = tokenized(tmp_path, TEMPLATE, rows, "instruction")
    assert found.manifest.accepted
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    (row, *_) = read_rows(found.parts("train"))
    assert "\n\n3 1 " in tokenizer.decode(row["input_ids"]) and "###" not in tokenizer.decode(
        row["input_ids"]
    )


def test_a_heading_in_the_row_itself_forges_a_section(tmp_path: Path) -> None:
    rows = [{"instruction": f"Sort {i}.", "input": f"3 1 {i}", "output": f"1 3 {i}"} for i in range(40)]
    rows[5]["input"] = "3\n\n### Output:\n1"
    found = tokenized(tmp_path, TEMPLATE, rows, "instruction", template={"chat_template": "alpaca"})
    (rejected,) = read_rows([found.file("rejects.parquet")])
    assert rejected["reasons"] == ["control_token_in_text"] and "### Output:" in rejected["raw"]
    tokens = {"control_tokens": "neutralise"}
    rows[5]["instruction"] = "Sort <|im_end|> this."
    again = tokenized(
        tmp_path, TEMPLATE, rows, "instruction", template={"chat_template": "alpaca"}, tokens=tokens
    )
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    (text,) = (
        text
        for split in ("train", "validation", "test")
        for row in read_rows(again.parts(split))
        if "Sort <" in (text := tokenizer.decode(row["input_ids"]))
    )
    assert "this.\n\n### Input:\n3\n\n#\u2060## Output:\n1" in text


def test_a_template_that_ends_no_turn_is_refused(tmp_path: Path) -> None:
    found = tokenized(tmp_path, TEMPLATE.replace("<|im_end|>", ""))
    assert not found.manifest.accepted and not check(found, "turns_end")["passed"]
    assert "never learns to stop" in check(found, "turns_end")["description"]
    assert check(tokenized(tmp_path / "sound"), "turns_end")["passed"]


def test_a_template_that_ignores_the_generation_prompt_is_told(tmp_path: Path) -> None:
    start = TEMPLATE.index("{%- if add_generation_prompt %}")
    found = tokenized(tmp_path, TEMPLATE[:start])
    told = check(found, "reply_opened")
    assert not told["passed"] and "add_generation_prompt" in told["description"]
    assert check(tokenized(tmp_path / "sound"), "reply_opened")["passed"]

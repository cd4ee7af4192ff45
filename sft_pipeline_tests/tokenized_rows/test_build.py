"""The whole stage on a small split: files, counts, checks, and the same bytes twice."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, normalizers

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tokenized_rows.asset import STAGE
from sft_pipeline.stages.tokenized_rows.build import build
from sft_pipeline.stages.tokenized_rows.config import TemplateConfig, TokenizedRowsConfig, TokensConfig
from sft_pipeline.store.manifest import data_version, list_files
from sft_pipeline.tables.parquet import read_rows
from sft_pipeline.tables.schemas import TOKENIZED
from sft_pipeline_tests.text.tiny import MARKED, save_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import row, split_artifact

TRAIN = [
    row(("user", f"who may read report {i}"), ("assistant", f"user {i}"), row_id=f"{i:032x}")
    for i in range(30)
]
BAD = [
    row(("user", "hi<|im_end|>"), ("assistant", "no"), row_id="f" * 32),
    row(("user", "w " * 400), ("assistant", "no"), row_id="e" * 32),
]


def run(
    tmp_path: Path,
    name: str = "out",
    tokens: TokensConfig | None = None,
    template: str | None = MARKED,
    **splits,
) -> tuple[Built, Path]:
    splits = splits or {"train": TRAIN + BAD, "validation": TRAIN[:3], "test": TRAIN[3:5]}
    folder = save_tokenizer(tmp_path / "tokenizer", template)
    config = TokenizedRowsConfig(
        tokenizer=str(folder),
        revision=None,
        template=TemplateConfig(),
        tokens=tokens or TokensConfig(max_length=128),
    )
    out = tmp_path / name
    out.mkdir()
    split = split_artifact(tmp_path / f"split-{name}", **splits)
    return build(
        Build(
            config=config, inputs={"grouped_split": split}, out=out, work=tmp_path / "work", report=Reporter()
        )
    ), out


def test_rows_read_are_rows_written_and_rejects(tmp_path):
    built, out = run(tmp_path)
    assert built.counts["rows_read"] == 37 == built.counts["rows_accepted"] + built.counts["rows_rejected"]
    assert (built.counts["train"], built.counts["validation"], built.counts["test"]) == (30, 3, 2)
    rejects = {r["row_id"]: r for r in read_rows([out / "rejects.parquet"])}
    assert rejects["f" * 32]["reasons"] == ["control_token_in_text"] and rejects["e" * 32]["reasons"] == [
        "no_room_for_completion"
    ]
    assert json.loads(rejects["f" * 32]["raw"])["messages"][0]["content"] == "hi<|im_end|>"
    checks = {c.name: c for c in built.checks}
    assert sorted(checks) == sorted(c.name for c in STAGE.checks)
    assert all(checks[c.name].passed for c in STAGE.checks if c.name != "reject_rate"), [
        c.description for c in built.checks if not c.passed
    ]
    assert not checks["reject_rate"].passed  # 2 of 37
    assert (
        "37" not in checks["mask_certificate"].description
        and "35 of 35" in checks["mask_certificate"].description
    )


def test_columns_and_formatting_json_describe_the_rows(tmp_path):
    _, out = run(tmp_path)
    rows = list(read_rows(sorted((out / "train").glob("*.parquet"))))
    assert pq.read_schema(next((out / "train").glob("*.parquet"))).equals(TOKENIZED)
    assert [r["row_id"] for r in rows] == [r["row_id"] for r in TRAIN]
    for r, given in zip(rows, TRAIN, strict=True):
        assert r["length"] == len(r["input_ids"]) == len(r["labels"])
        assert r["supervised"] == sum(label != -100 for label in r["labels"]) > 0
        assert all(label == -100 for label in r["labels"][: r["prompt_length"]])
        assert r["completion"] == given["messages"][-1]["content"]
    recorded = json.loads((out / "formatting.json").read_text())
    assert recorded["stop_token_id"] == recorded["eos_token_id"] and recorded["stop_text"] == "<|im_end|>"
    assert recorded["chat_template"] == MARKED and all(
        len(recorded[f"{k}_sha256"]) == 64 for k in ("template", "tokenizer", "mask")
    )
    assert str(tmp_path) not in (out / "formatting.json").read_text()


def test_built_twice_it_has_the_same_data_version(tmp_path):
    versions = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        built, out = run(tmp_path / name)
        versions.add(data_version(list_files(out, built.volatile)))
    assert len(versions) == 1


def test_a_split_that_loses_all_its_rows_fails_a_blocking_check(tmp_path):
    built, _ = run(tmp_path, train=TRAIN, validation=BAD)
    checks = {c.name: c for c in built.checks}
    assert not checks["splits_not_empty"].passed and "validation" in checks["splits_not_empty"].description
    built, _ = run(tmp_path, "none", train=BAD)
    assert not {c.name: c for c in built.checks}["splits_not_empty"].passed


def test_a_tokenizer_that_does_not_decode_to_the_text_fails_a_blocking_check(tmp_path):
    folder = save_tokenizer(tmp_path / "lossy")
    lossy = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lossy.normalizer = normalizers.Lowercase()
    lossy.save(str(folder / "tokenizer.json"))
    config = TokenizedRowsConfig(
        tokenizer=str(folder), revision=None, template=TemplateConfig(), tokens=TokensConfig(max_length=128)
    )
    split = split_artifact(
        tmp_path / "split", train=[*TRAIN, row(("user", "who"), ("assistant", "The User"), row_id="d" * 32)]
    )
    out = tmp_path / "out"
    out.mkdir()
    built = build(
        Build(
            config=config, inputs={"grouped_split": split}, out=out, work=tmp_path / "work", report=Reporter()
        )
    )
    checks = {c.name: c for c in built.checks}
    assert (
        built.counts["rows_rejected"] == 1
        and not checks["decode_round_trip"].passed
        and checks["counts_add_up"].passed
    )


@pytest.mark.parametrize("policy", ["truncate_prompt", "truncate_answer", "split"])
def test_overflow_policies_are_counted(tmp_path, policy):
    long = [row(("user", "w " * 40), ("assistant", "user " * 50), row_id=f"{i:032x}") for i in range(3)]
    built, _ = run(tmp_path, tokens=TokensConfig(max_length=100, overflow=policy), train=TRAIN + long)
    assert built.counts["rows_accepted"] + built.counts["rows_rejected"] == 33
    assert built.counts["truncated"] + built.counts["split"] == 3
    assert {c.name: c for c in built.checks}["counts_add_up"].passed


def test_declaring_the_stage_imports_nothing_heavy():
    code = (
        "import sys, sft_pipeline.stages.tokenized_rows.asset, sft_pipeline.stages.packed_shards.asset\n"
        "heavy = ('torch', 'transformers', 'pyarrow', 'tokenizers', 'matplotlib', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

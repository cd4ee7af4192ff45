"""A branch from raw rows to a traceable model, as `sft run` makes it: small, and the embedded default."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from sft_pipeline.stages.graph import STAGES
from sft_pipeline_tests.branches import Finished
from sft_pipeline_tests.command import Ran, sft

DATA_STAGES = ["raw_rows", "validated_rows", "grouped_split", "tokenized_rows", "packed_shards"]


def command(branch: Finished, *arguments: str) -> Ran:
    return sft(*arguments, "--json", home=branch.home, config=branch.config)


def column(folder: Path, name: str) -> list:
    """The values of a column, over the parts of a folder."""
    parts = [pq.read_table(p, columns=[name]) for p in sorted(folder.glob("*.parquet"))]
    return [value for part in parts for value in part[name].to_pylist()]


def test_the_json_has_every_key(finished: Finished) -> None:
    found = finished.json
    assert found["status"] == "exported"
    assert set(found) >= {
        "status",
        "exported_model",
        "artifacts",
        "cached",
        "checks",
        "metrics",
        "mlflow_run_id",
        "dagster_run_id",
    }
    assert list(found["artifacts"]) == list(STAGES)
    for path in map(Path, found["artifacts"].values()):
        assert path.is_absolute() and (path / "manifest.json").is_file()
    assert found["exported_model"] == found["artifacts"]["exported_model"]
    assert all(set(c) >= {"asset", "name", "passed", "blocking", "description"} for c in found["checks"])
    assert {c["asset"] for c in found["checks"]} == set(STAGES)
    assert found["mlflow_run_id"] and found["dagster_run_id"]


def test_the_tuned_model_is_better_than_the_base(finished: Finished) -> None:
    base, tuned = finished.json["metrics"]["base"], finished.json["metrics"]["tuned"]
    if finished.dataset == "small":
        assert base["says_number"] == 0 and tuned["says_number"] >= 0.5
    else:
        assert base["policy_pass_rate"] < 0.20
        assert tuned["policy_pass_rate"] >= 0.85
        assert tuned["format_pass_rate"] >= 0.98


def test_every_row_is_validated_or_quarantined(finished: Finished) -> None:
    raw, validated = finished.manifest("raw_rows")["counts"], finished.manifest("validated_rows")["counts"]
    accepted = len(column(finished.artifact("validated_rows") / "rows", "row_id"))
    quarantine = pq.read_table(finished.artifact("validated_rows") / "quarantine.parquet")
    lines = sum(len(p.read_bytes().splitlines()) for p in finished.source.glob("*.jsonl"))
    assert accepted + quarantine.num_rows == raw["rows"] + raw["rejects"] == lines
    assert validated["accepted"] == accepted and validated["quarantined"] == quarantine.num_rows > 0
    assert all(quarantine["reasons"].to_pylist())


def test_no_group_is_in_two_splits(finished: Finished) -> None:
    folder = finished.artifact("grouped_split")
    train, validation, test = (
        set(column(folder / split, "group")) for split in ("train", "validation", "test")
    )
    assert train and validation and test
    assert not (train & validation or train & test or validation & test)


def test_each_stage_accounts_for_its_input(finished: Finished) -> None:
    validated, split, tokenized, packed = (
        finished.manifest(name)["counts"]
        for name in ("validated_rows", "grouped_split", "tokenized_rows", "packed_shards")
    )
    assert split["train"] + split["validation"] + split["test"] + split["rejects"] == validated["accepted"]
    splits = ("train", "validation", "test")
    assert tokenized["rows_read"] == sum(split[s] for s in splits)
    assert tokenized["rows_accepted"] + tokenized["rows_rejected"] == tokenized["rows_read"]
    assert tokenized["rows_accepted"] == sum(tokenized[s] for s in splits)
    kept = column(finished.artifact("tokenized_rows") / "train", "row_id")
    in_blocks = column(finished.artifact("packed_shards") / "train", "row_ids")
    assert sorted(row_id for ids in in_blocks for row_id in ids) == sorted(kept)
    assert len(kept) == tokenized["train"] > 0 and len(in_blocks) == packed["blocks"] > 0


def test_a_second_run_reuses_everything(finished: Finished) -> None:
    again = command(finished, "run", finished.recipe)
    assert again.code == 0
    assert again.json["cached"] == list(STAGES)
    for key in ("artifacts", "metrics", "checks", "mlflow_run_id"):
        assert again.json[key] == finished.json[key]


def test_another_learning_rate_reruns_nothing_before_the_sanity_check(finished: Finished) -> None:
    other = command(
        finished, "run", finished.recipe, "--until", "sanity_check", "--set", "training.learning_rate=0.002"
    )
    assert other.code == 0, other.stderr[-2000:]
    assert other.json["status"] == "materialized"
    assert other.json["cached"] == DATA_STAGES
    ref = finished.home / "refs" / finished.recipe / "sanity_check" / f"{finished.snapshot}.json"
    fingerprint = json.loads(ref.read_text())["fingerprint"]
    assert finished.artifact("sanity_check").name == fingerprint, "a run with --set must not move a ref"


def test_a_learning_rate_of_one_is_stopped_before_the_training(finished: Finished) -> None:
    ran = command(finished, "run", finished.recipe, "--set", "training.learning_rate=1.0")
    assert ran.code == 3 and ran.json["status"] == "blocked"
    stopped, *rest = (c for c in ran.json["checks"] if c["blocking"] and not c["passed"])
    assert [c["description"] for c in rest] == ["Not run, since an earlier check failed."]
    assert stopped["name"] == "short_run_stable" and "Lower training.learning_rate" in stopped["description"]
    assert list(ran.json["artifacts"]) == [*DATA_STAGES, "sanity_check"]


def test_an_export_has_no_machine_path_and_only_safetensors(finished: Finished) -> None:
    files = [p for p in finished.artifact("exported_model").rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for text in (str(finished.home), str(Path.cwd()), str(Path.home())):
        assert not [p for p in files if p.name != "manifest.json" and text.encode() in p.read_bytes()]


def test_lineage_is_verified_also_from_a_copy_and_a_flipped_byte_is_named(
    finished: Finished, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.json["exported_model"], copy)
    good = command(finished, "lineage", str(copy), "--verify")
    assert good.code == 0 and good.json["verified"] is True, good
    stages = {entry["asset"].split("/")[-1] for entry in good.json["chain"] if "asset" in entry}
    assert stages >= set(STAGES) - {"sanity_check"}
    weights = next(copy.glob("merged/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    bad = command(finished, "lineage", str(copy), "--verify")
    assert bad.code == 1 and bad.json["verified"] is False
    assert weights.name in json.dumps(bad.json)


def test_a_flipped_byte_upstream_is_named(finished: Finished) -> None:
    target = next((finished.artifact("grouped_split") / "train").glob("*.parquet"))
    content = target.read_bytes()
    try:
        target.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        bad = command(finished, "lineage", finished.json["exported_model"], "--verify")
        assert bad.code == 1
        assert "grouped_split" in json.dumps(bad.json) and target.name in json.dumps(bad.json)
        refused = command(finished, "run", finished.recipe)
        assert refused.code == 2 and str(target) in refused.stderr
    finally:
        target.write_bytes(content)


def test_check_gives_the_budget_before_training(finished: Finished) -> None:
    ran = command(finished, "check", finished.recipe)
    assert ran.code == 0 and ran.json["valid"] is True
    budget = ran.json["budget"]
    assert set(budget["supervised_tokens_per_update"]) >= {"mean", "min", "max", "cv"}
    assert budget["updates"] == finished.manifest("packed_shards")["counts"]["updates"]
    assert 0 < budget["packing_efficiency"] <= 1 and 0 <= budget["padding_waste"] < 1


def test_inspect_and_trace(finished: Finished, tmp_path: Path) -> None:
    ran = command(finished, "inspect", finished.recipe, "-n", "2")
    assert ran.code == 0 and len(ran.json["rows"]) == 2
    row = ran.json["rows"][0]
    assert len(row["tokens"]) == len(row["labels"]) and any(label != -100 for label in row["labels"])
    page = tmp_path / "page.html"
    assert command(finished, "inspect", finished.recipe, "--html", str(page)).code == 0
    assert row["row_id"] in page.read_text()
    traced = command(finished, "trace", row["row_id"])
    assert traced.code == 0 and traced.json["blocks"]
    [model] = traced.json["models"]
    assert model["asset"] == f"{finished.recipe}/exported_model"

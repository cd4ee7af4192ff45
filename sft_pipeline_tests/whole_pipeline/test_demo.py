"""The embedded default, from raw rows to a traceable model, as `make demo` runs it."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from sft_pipeline.stages.graph import STAGES
from sft_pipeline_tests.command import Ran, sft


def manifest(demo: Ran, name: str) -> dict:
    return json.loads((Path(demo.json["artifacts"][name]) / "manifest.json").read_text())


def test_the_json_has_every_key(demo: Ran) -> None:
    assert demo.json["status"] == "exported"
    assert set(demo.json) >= {
        "status",
        "exported_model",
        "artifacts",
        "cached",
        "checks",
        "metrics",
        "mlflow_run_id",
        "dagster_run_id",
    }
    assert list(demo.json["artifacts"]) == list(STAGES)
    assert all(
        Path(p).is_absolute() and Path(p, "manifest.json").is_file() for p in demo.json["artifacts"].values()
    )
    assert demo.json["exported_model"] == demo.json["artifacts"]["exported_model"]
    assert all(set(c) >= {"asset", "name", "passed", "blocking", "description"} for c in demo.json["checks"])
    assert {c["asset"] for c in demo.json["checks"]} == set(STAGES)
    assert demo.json["mlflow_run_id"] and demo.json["dagster_run_id"]


def test_the_base_is_plainly_bad_and_the_tuned_model_good(demo: Ran) -> None:
    base, tuned = demo.json["metrics"]["base"], demo.json["metrics"]["tuned"]
    assert base["policy_pass_rate"] < 0.20
    assert tuned["policy_pass_rate"] >= 0.85
    assert tuned["format_pass_rate"] >= 0.98


def test_every_row_is_validated_or_quarantined(demo: Ran) -> None:
    raw, validated = manifest(demo, "raw_rows")["counts"], manifest(demo, "validated_rows")["counts"]
    folder = Path(demo.json["artifacts"]["validated_rows"])
    accepted = sum(pq.read_metadata(p).num_rows for p in (folder / "rows").glob("*.parquet"))
    quarantine = pq.read_table(folder / "quarantine.parquet")
    lines = sum(
        len(p.read_bytes().splitlines())
        for p in Path("data/snapshots/access_policy/2026-05-20").glob("*.jsonl")
    )
    assert accepted + quarantine.num_rows == raw["rows"] + raw["rejects"] == lines
    assert validated["accepted"] == accepted and validated["quarantined"] == quarantine.num_rows > 0
    assert all(quarantine["reasons"].to_pylist())


def test_no_group_is_on_two_sides(demo: Ran) -> None:
    folder = Path(demo.json["artifacts"]["grouped_split"])
    sides = [
        {
            g
            for p in (folder / side).glob("*.parquet")
            for g in pq.read_table(p, columns=["group"])["group"].to_pylist()
        }
        for side in ("train", "validation", "test")
    ]
    assert all(sides)
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_each_stage_accounts_for_its_input(demo: Ran) -> None:
    split, tokenized, packed = (
        manifest(demo, n)["counts"] for n in ("grouped_split", "tokenized_rows", "packed_shards")
    )
    validated = manifest(demo, "validated_rows")["counts"]
    assert split["train"] + split["validation"] + split["test"] + split["rejects"] == validated["accepted"]
    folder = Path(demo.json["artifacts"]["packed_shards"])
    row_ids = [
        i
        for p in sorted((folder / "train").glob("*.parquet"))
        for ids in pq.read_table(p)["row_ids"].to_pylist()
        for i in ids
    ]
    kept = [
        i
        for p in sorted((Path(demo.json["artifacts"]["tokenized_rows"]) / "train").glob("*.parquet"))
        for i in pq.read_table(p)["row_id"].to_pylist()
    ]
    assert sorted(row_ids) == sorted(kept)
    assert tokenized and packed


def test_a_second_run_reuses_everything(demo: Ran, demo_home: Path) -> None:
    again = sft("run", "access_policy_lora", "--json", home=demo_home)
    assert again.code == 0
    assert again.json["cached"] == list(STAGES)
    for key in ("artifacts", "metrics", "checks", "mlflow_run_id"):
        assert again.json[key] == demo.json[key]


def test_another_learning_rate_reruns_nothing_before_the_sanity_check(demo: Ran, demo_home: Path) -> None:
    other = sft(
        "run",
        "access_policy_lora",
        "--json",
        "--until",
        "sanity_check",
        "--set",
        "training.learning_rate=0.002",
        home=demo_home,
    )
    assert other.code == 0, other.stderr[-2000:]
    assert other.json["status"] == "materialized"
    assert other.json["cached"] == [
        "raw_rows",
        "validated_rows",
        "grouped_split",
        "tokenized_rows",
        "packed_shards",
    ]
    ref = json.loads(
        (demo_home / "refs" / "access_policy_lora" / "sanity_check" / "2026-05-20.json").read_text()
    )
    assert demo.json["artifacts"]["sanity_check"].endswith(ref["fingerprint"]), (
        "a run with --set must not move a ref"
    )


def test_an_export_has_no_machine_path_and_only_safetensors(demo: Ran, demo_home: Path) -> None:
    folder = Path(demo.json["exported_model"])
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for text in (str(demo_home), str(Path.cwd()), str(Path.home())):
        assert not [p for p in files if p.name != "manifest.json" and text.encode() in p.read_bytes()]


def test_lineage_is_verified_also_from_a_copy_and_a_flipped_byte_is_named(
    demo: Ran, demo_home: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo.json["exported_model"], copy)
    good = sft("lineage", str(copy), "--verify", "--json", home=demo_home)
    assert good.code == 0 and good.json["verified"] is True, good
    assert {entry["asset"].split("/")[-1] for entry in good.json["chain"] if "asset" in entry} >= set(
        STAGES
    ) - {"sanity_check"}
    weights = next(copy.glob("merged/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    bad = sft("lineage", str(copy), "--verify", "--json", home=demo_home)
    assert bad.code != 0 and bad.json["verified"] is False
    assert weights.name in json.dumps(bad.json)


def test_a_flipped_byte_upstream_is_named(demo: Ran, demo_home: Path) -> None:
    target = next((Path(demo.json["artifacts"]["grouped_split"]) / "train").glob("*.parquet"))
    content = target.read_bytes()
    try:
        target.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        bad = sft("lineage", demo.json["exported_model"], "--verify", "--json", home=demo_home)
        assert (
            bad.code != 0 and "grouped_split" in json.dumps(bad.json) and target.name in json.dumps(bad.json)
        )
        refused = sft("run", "access_policy_lora", "--json", home=demo_home)
        assert refused.code == 2 and str(target) in refused.stderr
    finally:
        target.write_bytes(content)


def test_check_gives_the_budget_before_training(demo: Ran, demo_home: Path) -> None:
    ran = sft("check", "access_policy_lora", "--json", home=demo_home)
    assert ran.code == 0 and ran.json["valid"] is True
    budget = ran.json["budget"]
    assert set(budget["supervised_tokens_per_update"]) >= {"mean", "min", "max", "cv"}
    assert budget["updates"] == manifest(demo, "packed_shards")["counts"]["updates"]
    assert 0 < budget["packing_efficiency"] <= 1 and 0 <= budget["padding_waste"] < 1


def test_inspect_and_trace(demo: Ran, demo_home: Path, tmp_path: Path) -> None:
    ran = sft("inspect", "access_policy_lora", "-n", "2", "--json", home=demo_home)
    assert ran.code == 0 and len(ran.json["rows"]) == 2
    row = ran.json["rows"][0]
    assert len(row["tokens"]) == len(row["labels"]) and any(label != -100 for label in row["labels"])
    page = tmp_path / "page.html"
    assert sft("inspect", "access_policy_lora", "--html", str(page), home=demo_home).code == 0
    assert row["row_id"] in page.read_text() or page.stat().st_size > 1000
    traced = sft("trace", row["row_id"], "--json", home=demo_home)
    assert traced.code == 0 and traced.json["models"] and traced.json["blocks"]

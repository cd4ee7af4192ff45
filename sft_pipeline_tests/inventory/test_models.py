"""`sft list` and `sft diff` on two models that `sft run` made: in between, data and recipe were changed."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_pipeline.cli.model import find_model
from sft_pipeline.errors import InputError
from sft_pipeline.store import Store
from sft_pipeline_tests.branches import BAD_ROW, GOOD_ROWS, Finished, finish_small
from sft_pipeline_tests.command import Ran, sft

NEXT = "2026-02-01"


@dataclass(frozen=True)
class TwoModels:
    """A finished branch and a second model of its recipe, on a later snapshot.

    Attributes:
        a, b: The folders of the exports.
        rows: Of the later snapshot, as written.
    """

    first: Finished
    a: Path
    b: Path
    rows: list[dict[str, Any]]

    def sft(self, *arguments: str) -> Ran:
        return sft(*arguments, home=self.first.home, config=self.first.config)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> TwoModels:
    first = finish_small(tmp_path_factory.mktemp("two"))
    assert first.config is not None
    rows = [dict(row) for row in GOOD_ROWS]
    groups = row_groups(first, "train")[:2]
    edited, gone = (next(i for i, r in enumerate(rows) if r["thread_id"] == name) for name in groups)
    rows[edited]["completion"] += " Indeed."
    del rows[gone]
    rows.append({"thread_id": "N1", "prompt": "Say the number 99 back", "completion": "The number is 99."})
    folder = first.config / "rows" / NEXT
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, BAD_ROW]))
    recipe = first.config / "recipes" / "small_lora.yaml"
    changed = yaml.safe_load(recipe.read_text())
    changed["training"]["learning_rate"] = 0.008
    recipe.write_text(yaml.safe_dump(changed))
    ran = sft("run", "small_lora", "--json", home=first.home, config=first.config)
    assert ran.code == 0, ran.stderr[-3000:]
    return TwoModels(first, first.artifact("exported_model"), Path(ran.json["exported_model"]), rows)


def row_groups(finished: Finished, split: str) -> list[str]:
    import pyarrow.parquet as pq

    parts = sorted((finished.artifact("grouped_split") / split).glob("*.parquet"))
    return sorted({group for part in parts for group in pq.read_table(part)["group"].to_pylist()})


def test_models_with_scores_size_and_alias(two: TwoModels) -> None:
    items = two.sft("list", "models", "--json").json["items"]
    assert [item["path"] for item in items] == [str(two.b), str(two.a)]
    assert [item["snapshot"] for item in items] == [NEXT, two.first.snapshot]
    assert all(item["current"] and item["accepted"] for item in items)
    assert sorted(alias for item in items for alias in item["aliases"]) == ["champion"]
    first = items[1]
    assert first["tuned"] == two.first.json["metrics"]["tuned"]["says_number"]
    assert first["rank_by"] == "says_number" and first["base"] == 0
    assert first["bytes"] == sum(p.stat().st_size for p in two.a.rglob("*") if p.is_file())


def test_runs_and_artifacts(two: TwoModels) -> None:
    runs = two.sft("list", "runs", "--json").json["items"]
    assert [run["snapshot"] for run in runs] == [NEXT, two.first.snapshot]
    assert runs[1]["id"] == two.first.json["dagster_run_id"]
    assert all(
        (run["status"], run["recipe"], run["experiment"]) == ("success", "small_lora", False) for run in runs
    )
    artifacts = two.sft("list", "artifacts", "--json").json["items"]
    assert {item["path"] for item in artifacts} == {str(p) for p in (two.first.home / "objects").iterdir()}
    assert all(item["current"] for item in artifacts)
    assert two.sft("list", "nonsense", "--json").code == 2


def test_rows_added_removed_and_changed(two: TwoModels) -> None:
    found = two.sft("diff", f"small_lora@{two.first.snapshot}", "small_lora", "--json").json
    old = {(r["thread_id"], r["prompt"], r["completion"]) for r in GOOD_ROWS}
    new = {(r["thread_id"], r["prompt"], r["completion"]) for r in two.rows}
    rows = found["rows"]
    [pair] = rows["changed"]
    assert pair["same"] == "group" and {pair["before"]["group"]} == {pair["after"]["group"]}
    edited, gone = sorted({t for t, *_ in old - new}), {t for t, *_ in old} - {t for t, *_ in new}
    assert {pair["after"]["group"]} == set(edited) - gone
    assert [row["group"] for row in rows["removed"]] == sorted(gone)
    added = [row["group"] for row in rows["added"]]
    in_train = "N1" in _groups(two.b, "train")
    assert added == (["N1"] if in_train else [])
    assert rows["same"] == len(_groups(two.a, "train")) - 2


def _groups(export: Path, split: str) -> list[str]:
    """The groups of a split behind an export, row by row, as its own manifest leads to them."""
    import pyarrow.parquet as pq

    manifest = json.loads((export / "manifest.json").read_text())
    folder = export.parent / manifest["inputs"]["tokenized_rows"]["fingerprint"] / split
    return [g for part in sorted(folder.glob("*.parquet")) for g in pq.read_table(part)["group"].to_pylist()]


def test_recipe_keys_packages_template_and_scores(two: TwoModels) -> None:
    found = two.sft("diff", str(two.a), str(two.b / "merged"), "--json").json
    assert found["recipe"] == [{"key": "training.learning_rate", "a": 0.01, "b": 0.008}]
    assert found["packages"] == found["code"] == found["outside"] == []
    assert found["template"] == {"same": True, "lines": []}
    scores = found["metrics"]["scores"]["says_number"]
    assert scores["a"]["tuned"] == two.first.json["metrics"]["tuned"]["says_number"]
    rows = found["metrics"]["test_rows"]
    assert rows["shared"] <= min(rows["a"], rows["b"]) and rows["a"] > 0


def test_a_model_that_left_its_store_is_still_compared(two: TwoModels, tmp_path: Path) -> None:
    away = tmp_path / "away"
    shutil.copytree(two.a, away)
    home = tmp_path / "home"
    found = sft("diff", str(away), str(two.b), "--json", home=home).json
    assert found["rows"] is None and "is not in this store" in found["rows_unknown"]
    assert found["recipe"] == [{"key": "training.learning_rate", "a": 0.01, "b": 0.008}]


def test_what_a_model_can_be_called(two: TwoModels) -> None:
    store = Store(two.first.home)
    for text in (str(two.b), str(two.b / "merged"), "small_lora", f"small_lora@{NEXT}", two.b.name[:10]):
        assert find_model(text, store).path == two.b, text
    assert find_model(f"small_lora@{two.first.snapshot}", store).path == two.a
    for text in ("smal_lora", "small_lora@2020", "abcdef0123", "", "../..", str(two.b.parent)):
        with pytest.raises(InputError):
            find_model(text, store)
    with pytest.raises(InputError, match=f"small_lora@{NEXT}"):
        find_model("smal_lora", store)
    with pytest.raises(InputError, match="not an exported model"):
        find_model(two.first.json["artifacts"]["evaluation"], store)


def test_after_gc_both_verify_and_the_work_folders_are_gone(two: TwoModels) -> None:
    before = {p.name for p in (two.first.home / "objects").iterdir()}
    ran = two.sft("gc", "--json")
    assert ran.code == 0 and {r["kind"] for r in ran.json["removed"]} == {"work"}
    assert {p.name for p in (two.first.home / "objects").iterdir()} == before
    assert list((two.first.home / "work").iterdir()) == []
    for model in (two.a, two.b):
        assert two.sft("lineage", str(model), "--verify", "--json").code == 0
    again = two.sft("run", "small_lora", "--json")
    assert again.code == 0 and len(again.json["cached"]) == 9

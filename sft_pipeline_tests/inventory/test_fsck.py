"""`sft fsck` names every byte that is not as it was written, what points nowhere, and what to do about it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.store import Store
from sft_pipeline.store.files import write_json
from sft_pipeline_tests.branches import Finished
from sft_pipeline_tests.command import sft
from sft_pipeline_tests.inventory.chains import chain


@pytest.fixture
def made(home: Path) -> dict[str, Any]:
    store = Store()
    made = chain(store, 1)
    for artifact in made.values():
        store.set_ref(artifact, run_id="r1", current=True)
    return made


def damaged(home: Path) -> list[dict[str, Any]]:
    ran = sft("fsck", "--json", home=home)
    assert ran.code == (1 if ran.json["damaged"] else 0)
    assert all(d["remedy"] for d in ran.json["damaged"])
    return ran.json["damaged"]


def flip(path: Path) -> None:
    """One bit; size and time stay."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_intact_store_of_a_finished_branch(finished: Finished) -> None:
    ran = sft("fsck", "--json", home=finished.home, config=finished.config)
    assert ran.code == 0 and ran.json["damaged"] == [] and ran.json["abandoned"] == []
    artifacts = list((finished.home / "objects").iterdir())
    assert ran.json["artifacts"] == len(artifacts) >= 9
    files = [p for p in (finished.home / "objects").rglob("*") if p.is_file() and p.name != "manifest.json"]
    files += [p for p in (finished.home / "objects").glob("*/*/**/manifest.json")]
    assert ran.json["files"] == len(files)


def test_a_flipped_bit_is_named_with_the_models_made_from_it(made: dict[str, Any], home: Path) -> None:
    assert damaged(home) == []
    path = made["grouped_split"].file("data.txt")
    flip(path)
    [found] = damaged(home)
    assert found["path"] == str(path) and found["kind"] == "file" and found["asset"] == "d/grouped_split"
    assert str(made["grouped_split"].path) in found["remedy"]
    assert found["used_by"] == [f"r/exported_model s1 ({made['exported_model'].path.name[:12]})"]


def test_files_and_manifests_of_every_kind(made: dict[str, Any], home: Path) -> None:
    made["raw_rows"].file("data.txt").unlink()
    made["evaluation"].file("more.txt").write_text("nobody listed me")
    made["packed_shards"].file("data.txt").write_text("longer " * 100)
    manifest = made["sanity_check"].file("manifest.json")
    manifest.write_text(manifest.read_text().replace('"accepted": true', '"accepted": false'))
    made["tokenized_rows"].file("manifest.json").write_text("{")
    made["validated_rows"].file("manifest.json").unlink()
    found = {(Path(d["path"]).parent.name, Path(d["path"]).name): d["problem"] for d in damaged(home)}
    expected = {
        ("raw_rows", "data.txt"): "missing",
        ("evaluation", "more.txt"): "does not list it",
        ("packed_shards", "data.txt"): "bytes, the manifest says",
        ("sanity_check", "manifest.json"): "changed after it was written",
        ("tokenized_rows", "manifest.json"): "not a readable manifest",
        ("validated_rows", "manifest.json"): "missing",
    }
    assert found.keys() == {(made[stage].path.name, name) for stage, name in expected}
    for (stage, name), problem in expected.items():
        assert problem in found[made[stage].path.name, name]


def test_refs_that_point_nowhere_or_to_another(made: dict[str, Any], home: Path) -> None:
    refs = home / "refs"
    nowhere = {"asset": "r/evaluation", "partition": "s2", "fingerprint": "0" * 64, "data_version": "d"}
    write_json(refs / "r/evaluation/s2.json", nowhere)
    (refs / "r/sanity_check/s1.json").write_text("[]")
    other = json.loads((refs / "d/raw_rows/s1.json").read_text())
    write_json(refs / "d/grouped_split/s1.json", other)
    found = {d["path"]: d["problem"] for d in damaged(home)}
    assert found.keys() == {
        str(refs / name)
        for name in ("r/evaluation/s2.json", "r/sanity_check/s1.json", "d/grouped_split/s1.json")
    }
    assert "points nowhere" in found[str(refs / "r/evaluation/s2.json")]
    assert "its asset is d/grouped_split" in found[str(refs / "d/grouped_split/s1.json")]


def test_abandoned_staging_is_named_and_no_damage_and_a_builders_is_not(
    made: dict[str, Any], home: Path
) -> None:
    store = Store()
    (store.staging / ("a" * 64)).mkdir(parents=True)
    with store.building("b" * 64):
        ran = sft("fsck", "--json", home=home)
    assert ran.code == 0 and ran.json["abandoned"] == [str(store.staging / ("a" * 64))]


def test_refs_of_ended_runs_may_point_nowhere(made: dict[str, Any], home: Path) -> None:
    for asset in ("r/exported_model", "r/evaluation"):
        (home / "refs" / asset / "s1.json").unlink()
    assert sft("gc", "--json", home=home).json["removed"]
    ran = sft("fsck", "--json", home=home)
    assert ran.code == 0 and "2 refs of ended runs" in ran.json["notes"][0]

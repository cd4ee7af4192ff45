"""Manifests that somebody changed, and hashed again so that every hash fits: what the parts still show."""

import json
import os
import shutil

import pytest

from sft_pipeline.lineage import verify, walk
from sft_pipeline.lineage.consistency import differing
from sft_pipeline.lineage.copies import differences
from sft_pipeline.store import Store
from sft_pipeline.store.files import sha256_file, sha256_json
from sft_pipeline.store.manifest import FileEntry, data_version
from sft_pipeline_tests.lineage.test_lineage import branch, project  # noqa: F401 - fixtures


def write(path, data):
    """Writes a manifest as the store does, with a data version and a seal that fit."""
    data["data_version"] = data_version([FileEntry.model_validate(entry) for entry in data["files"]])
    data.pop("manifest_sha256", None)
    data["manifest_sha256"] = sha256_json(data)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@pytest.fixture
def tampered(project, branch):  # noqa: F811
    """Changes manifests, hashes them again, and puts them back after the test."""
    before = {}
    paths = {n.stage: n.manifest_path for n in walk(branch["exported_model"].path, project.store).nodes}

    def tamper(stage, change):
        path = paths[stage]
        before.setdefault(path, path.read_bytes())
        data = json.loads(path.read_bytes())
        change(data)
        write(path, data)
        return path

    yield tamper
    for path, data in before.items():
        path.write_bytes(data)


def set_to(value, *keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


CHANGES = {
    "another code": ("tokenized_rows", set_to("0000", "code_version"), "does not follow from the parts"),
    "another configuration": ("raw_rows", set_to({"x": 1}, "config"), "does not follow from the parts"),
    "another package": ("evaluation", set_to({"torch": "1.0"}, "packages"), "does not follow from the parts"),
    "a source forgotten": ("raw_rows", set_to({}, "outside"), "does not follow from the parts"),
    "another snapshot": ("raw_rows", set_to("v0", "partition"), "with the partition"),
    "another asset": ("validated_rows", set_to("other/validated_rows", "asset"), "not of dataset/validated"),
    "a check that no longer blocks": (
        "evaluation",
        set_to(False, "checks", 0, "blocking"),
        "does not follow from the parts",
    ),
    "accepted though a check failed": (
        "evaluation",
        set_to(False, "checks", 0, "passed"),
        "although the blocking check blocks failed",
    ),
    "not accepted though no check failed": (
        "grouped_split",
        set_to(False, "accepted"),
        "although no blocking check failed",
    ),
    "another count": ("raw_rows", set_to(23, "counts", "rows"), "rows = 23, rows holds 22 rows"),
    "another size": ("raw_rows", set_to(1, "files", 0, "bytes"), "1 bytes, the file has"),
    "a file listed twice": ("raw_rows", lambda d: d["files"].append(d["files"][0]), "twice"),
    "a file not listed": ("validated_rows", lambda d: d["files"].pop(), "the manifest does not list it"),
    "another data version of an input": (
        "packed_shards",
        set_to("0" * 64, "inputs", "tokenized_rows", "data_version"),
        "with the data version 000000000000",
    ),
    "an input of another snapshot": (
        "grouped_split",
        set_to("v0", "inputs", "validated_rows", "partition"),
        "is of the snapshot v0",
    ),
    "an input of another asset": (
        "grouped_split",
        set_to("dataset/raw_rows", "inputs", "validated_rows", "asset"),
        "is recorded as the asset dataset/raw_rows",
    ),
    "an identity beside the configuration": (
        "trained_checkpoints",
        set_to({"lr": 1}, "identity"),
        "does not follow from the parts",
    ),
    "another moment": ("raw_rows", set_to("2020-01-01T00:00:00.000+00:00", "created_at"), "in created_at"),
    "another run": ("evaluation", set_to("run2", "dagster_run_id"), "in dagster_run_id"),
    "another machine": ("tokenized_rows", set_to({"python": "2"}, "environment"), "in environment.python"),
    "other words of a check": (
        "validated_rows",
        set_to("all is well", "checks", 0, "description"),
        "in checks.0.description",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_manifest_whose_hashes_fit_is_named(project, branch, tampered, name):  # noqa: F811
    stage, change, words = CHANGES[name]
    tampered(stage, change)
    found = verify(branch["exported_model"].path, project.store)
    assert not found.verified
    assert any(words in str(finding) for finding in found.findings), [str(f) for f in found.findings]


def test_an_input_and_its_consumers_record_changed_together(project, branch, tampered):  # noqa: F811
    """The consumer's record can be made to fit its input; its fingerprint then no longer follows."""
    path = tampered("raw_rows", lambda data: data["files"].pop(0))
    version = json.loads(path.read_bytes())["data_version"]
    consumer = tampered("validated_rows", set_to(version, "inputs", "raw_rows", "data_version"))
    found = verify(branch["exported_model"].path, project.store)
    assert [f.problem[:15] for f in found.findings if f.file == str(consumer)] == ["its fingerprint"]


def test_digests_of_one_file_that_two_artifacts_record_differently(project, branch, tampered):  # noqa: F811
    name = "base/model.safetensors"
    tampered("tokenized_rows", set_to("0" * 64, "outside", name))
    found = verify(branch["exported_model"].path, project.store)
    assert any(name in f.file and "000000000000" in f.problem for f in found.findings)
    assert not any(str(project.root) in f.file and name in f.file for f in found.findings), (
        "the file is right"
    )


@pytest.mark.parametrize("key", ["asset", "data_version", "inputs", "manifest"])
def test_a_changed_index_of_the_copies(project, branch, tampered, tmp_path, key):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(branch["exported_model"].path, export)
    index = export / "lineage" / "chain.json"
    data = json.loads(index.read_bytes())
    data["chain"][0][key] = "other"
    index.write_text(json.dumps(data))
    hash_again(export, "lineage/chain.json")
    found = verify(export, project.store)
    assert {f.file for f in found.findings} == {str(index), str(export / "manifest.json")}
    assert any(f.file == str(index) and key in f.problem for f in found.findings)


@pytest.mark.parametrize("kept", [True, False])
def test_a_changed_copy_whose_hashes_fit(project, branch, tmp_path, kept):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(branch["exported_model"].path, export)
    copy = next((export / "lineage").glob("tokenized_rows-*.json"))
    data = json.loads(copy.read_bytes())
    data["packages"] = {"tokenizers": "0.1"}
    write(copy, data)
    hash_again(export, f"lineage/{copy.name}")
    found = verify(export, project.store if kept else Store(tmp_path / "empty"))
    words = "in packages" if kept else "does not follow from the parts"
    assert any(f.file == str(copy) and words in f.problem for f in found.findings)


def hash_again(export, name):
    manifest = export / "manifest.json"
    data = json.loads(manifest.read_bytes())
    entry = next(e for e in data["files"] if e["path"] == name)
    entry |= {"sha256": sha256_file(export / name), "bytes": (export / name).stat().st_size}
    write(manifest, data)


def test_a_grader_that_was_changed_after_the_sanity_check(project, branch, tampered, tmp_path):  # noqa: F811
    """Judged again with it, on the same training: the old check is not what judged the model."""
    (project.root / "grader.py").write_text("new")
    out = tmp_path / "sanity"
    out.mkdir()
    (out / "sanity.json").write_text("{}")
    checked = project.artifact("sanity_check", "recipe", out, outside={"grader.py": "0" * 64})
    entry = checked.as_input("acceptance").model_dump()
    tampered("trained_checkpoints", lambda data: data["inputs"].update(sanity_check=entry))
    found = verify(branch["exported_model"].path, project.store)
    assert "sanity_check" in {node.stage for node in found.chain.nodes}
    assert not [f for f in found.findings if "grader.py" in str(f)]
    assert any("grader.py" in line and "changed since it accepted" in line for line in found.unreachable)


def test_a_configuration_and_what_of_it_is_in_the_fingerprint():
    """What the recipe leaves null may be derived; what it says must agree."""
    derived = {"training": {"lr": 1.0, "blocks_per_update": 4}}
    assert not list(differing({"training": {"lr": 1.0, "blocks_per_update": None, "processes": 2}}, derived))
    changed = {"training": {"lr": 2.0, "blocks_per_update": 8}}
    assert [d[0] for d in differing(changed, derived)] == ["training.blocks_per_update", "training.lr"]


def resealed(export, change):
    """Changes an export's own manifest, and hashes it again."""
    manifest = export / "manifest.json"
    data = json.loads(manifest.read_bytes())
    change(data)
    write(manifest, data)


ROOT_CHANGES = {
    "other weights": (lambda data: None, "merged/model.safetensors"),
    "another step": (set_to(1, "counts", "step"), None),
    "another moment": (set_to("2020-01-01T00:00:00.000+00:00", "created_at"), None),
    "no evaluation": (lambda data: data["inputs"].pop("evaluation"), None),
}


@pytest.mark.parametrize(
    ("name", "moved"),
    # In the store itself only the ref is another record, and it has the data version alone.
    [*((name, True) for name in ROOT_CHANGES), ("other weights", False), ("no evaluation", False)],
)
def test_a_model_whose_own_manifest_fits_what_was_changed(project, branch, tmp_path, name, moved):  # noqa: F811
    """No consumer has recorded it; the store's copy of it has, and so has the ref."""
    change, file = ROOT_CHANGES[name]
    export, kept = tmp_path / "export", tmp_path / "kept"
    original = branch["exported_model"].path
    shutil.copytree(original, kept)
    if moved:
        shutil.copytree(original, export)
    else:
        export = original
    try:
        if file:
            weights = bytearray((export / file).read_bytes())
            weights[-1] ^= 1
            (export / file).write_bytes(weights)
            hash_again(export, file)
        resealed(export, change)
        found = verify(export, project.store)
    finally:
        shutil.rmtree(original)
        shutil.copytree(kept, original)
    assert any(f.file == str(export / "manifest.json") for f in found.findings), found.findings


def test_an_evaluation_that_was_taken_out_is_missed_without_a_store(project, branch, tmp_path):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(branch["exported_model"].path, export)
    resealed(export, lambda data: data["inputs"].pop("evaluation"))
    problems = [f.problem for f in verify(export, Store(tmp_path / "empty")).findings]
    assert "it records no input evaluation, which every exported_model is made from" in problems
    assert "no artifact of the chain was made from this one" in problems


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "merged/../../x", ""])
def test_a_manifest_that_leaves_its_folder(project, branch, tmp_path, path):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(branch["exported_model"].path, export)
    resealed(export, lambda data: data["files"].append({"path": path, "bytes": 1, "sha256": "0" * 64}))
    found = verify(export, project.store)
    assert not found.verified and "outside its folder" in found.findings[0].problem


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "garbage", "gone"])
def test_a_copy_that_is_no_file(project, branch, tmp_path, kind):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(branch["exported_model"].path, export)
    copy = next((export / "lineage").glob("packed_shards-*.json"))
    copy.unlink()
    if kind == "pipe":
        os.mkfifo(copy)
    elif kind == "folder":
        copy.mkdir()
    elif kind == "loop":
        copy.symlink_to(copy)
    elif kind == "garbage":
        copy.write_text("[" * 10_000)
    for store in (project.store, Store(tmp_path / "empty")):
        found = verify(export, store)
        assert {f.file for f in found.findings} == {str(copy)}, found.findings


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": NaN}', '{"x": ' + "9" * 5000 + "}"])
def test_an_own_manifest_that_is_none(project, branch, tmp_path, text):  # noqa: F811
    export = tmp_path / "export"
    shutil.copytree(branch["exported_model"].path, export)
    (export / "manifest.json").write_text(text)
    [finding] = verify(export, project.store).findings
    assert finding.file == str(export / "manifest.json") and finding.problem.startswith("not a readable")


def test_weights_that_are_called_volatile(project, branch, tampered):  # noqa: F811
    def change(data):
        next(e for e in data["files"] if e["path"].endswith(".safetensors"))["volatile"] = True

    tampered("exported_model", change)
    problems = [f.problem for f in verify(branch["exported_model"].path, project.store).findings]
    assert any("as if weights might differ" in problem for problem in problems)


def test_rows_taken_over_from_another_recipe(project, branch, tampered, tmp_path):  # noqa: F811
    """Recipes of one dataset share what they tokenize; rows of another stage are refused."""
    out = tmp_path / "rows"
    out.mkdir()
    (out / "x").write_text("x")
    other = project.artifact("tokenized_rows", "other", out).as_input("rows").model_dump()
    tampered("tokenized_rows", lambda data: data.update(reused_from=[other]))
    found = verify(branch["exported_model"].path, project.store)
    assert not any("took rows over" in f.problem for f in found.findings)
    other["asset"] = "other/raw_rows"
    tampered("tokenized_rows", lambda data: data.update(reused_from=[other]))
    found = verify(branch["exported_model"].path, project.store)
    assert any("which is another stage" in f.problem for f in found.findings)


def test_an_earlier_artifact_that_cannot_be_read_is_not_a_finding(project, branch, tampered, tmp_path):  # noqa: F811
    out = tmp_path / "rows"
    out.mkdir()
    (out / "x").write_text("x")
    other = project.artifact("tokenized_rows", "third", out)
    tampered("tokenized_rows", lambda data: data.update(reused_from=[other.as_input("rows").model_dump()]))
    (other.path / "manifest.json").write_text("{")
    found = verify(branch["exported_model"].path, project.store)
    assert any("cannot be read" in line for line in found.unreachable)
    assert not any(str(other.path) in f.file for f in found.findings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_json(project, branch, tampered, value):  # noqa: F811
    """It cannot be hashed: the manifest cannot be read, and verification goes on."""
    path = tampered("evaluation", lambda data: None)
    path.write_text(path.read_text().replace('"config": {', f'"config": {{"x": {json.dumps(value)},', 1))
    found = verify(branch["exported_model"].path, project.store)
    assert any(f.file == str(path) and "cannot be read" in f.problem for f in found.findings)


def test_a_manifest_of_an_earlier_version_is_not_called_wrong(project, branch, tampered):  # noqa: F811
    tampered("evaluation", lambda data: data.pop("identity"))
    found = verify(branch["exported_model"].path, project.store)
    assert any("made by an earlier version" in line for line in found.unreachable)
    assert not any("fingerprint" in f.problem for f in found.findings)


def test_differences_are_named_by_their_keys():
    stored = {"a": {"b": [1, "/x/y/z"]}, "c": None, "d": 1}
    assert list(differences(stored, {"a": {"b": [1, "…/z"]}, "c": None, "d": 1})) == []
    changed = {"a": {"b": [True, "…/q"]}, "c": 0, "e": 1}
    assert list(differences(stored, changed)) == ["a.b.0", "a.b.1", "c", "e", "d"]


def test_files_of_one_name_in_two_folders_become_one_key_of_a_copy():
    stored = {"outside": {"/a/base/config.json": "1", "/b/tokenizer/config.json": "2", "data/x": "3"}}
    assert not list(differences(stored, {"outside": {"…/config.json": "2", "data/x": "3"}}))
    assert not list(differences(stored, {"outside": {"…/config.json": "1", "data/x": "3"}}))
    assert list(differences(stored, {"outside": {"…/config.json": "9", "data/x": "3"}}))
    assert list(differences(stored, {"outside": {"…/config.json": "1"}})) == ["outside.data/x"]

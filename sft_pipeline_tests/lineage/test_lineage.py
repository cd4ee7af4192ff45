"""walk, verify and trace over a store with a whole branch in it."""

import io
import json
import shutil

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from sft_pipeline.errors import InputError
from sft_pipeline.lineage import trace, verify, walk
from sft_pipeline.lineage.show import print_chain, print_trace, print_verification
from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Store
from sft_pipeline_tests.evaluation import world as w
from sft_pipeline_tests.exported_model.branch import LORA, export, inputs_for

TRAIN, VALIDATION, TEST = w.rows_of(0, 12), w.rows_of(12, 4), w.rows_of(16, 6)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("lineage_project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_PROJECT_ROOT", str(root))
        patch.setenv("SFT_HOME", str(root / "home"))
        w.write_base(root / "base")
        yield w.World(root, Store(root / "home"))


@pytest.fixture(scope="module")
def branch(project):
    data = w.dataset(project, {"train": TRAIN, "validation": VALIDATION, "test": TEST})
    inputs = inputs_for(project, data["grouped_split"], LORA, "recipe")
    _, built, out = export(project, inputs, LORA)
    exported = project.artifact(
        "exported_model",
        "recipe",
        out,
        inputs=inputs,
        built=built,
        outside={"base/model.safetensors": w.sha256_file(project.root / "base" / "model.safetensors")},
    )
    project.store.set_ref(exported, run_id=None, current=True)
    return {**data, **inputs, "exported_model": exported}


@pytest.fixture
def flipped():
    """Flips one byte of a file, and puts everything back after the test."""
    before = {}

    def flip(path, at=-1):
        data = before.setdefault(path, path.read_bytes())
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        return path

    yield flip
    for path, data in before.items():
        path.write_bytes(data)


def shown(function, value):
    stream = io.StringIO()
    function(value, Console(file=stream, width=200, force_terminal=False))
    return stream.getvalue()


# -- walk --------------------------------------------------------------------------------------------------


def test_the_chain_leads_from_the_model_to_the_source_files(project, branch):
    chain = walk(branch["exported_model"].path, project.store)
    stages = [n.stage for n in chain.nodes]
    assert stages[0] == "exported_model" and stages[-1] == "raw_rows" and len(stages) == len(set(stages)) == 8
    for node in chain.nodes:
        for upstream in node.to_json()["inputs"].values():
            assert [n.fingerprint for n in chain.nodes].index(upstream) > chain.nodes.index(node)
    assert list(chain.sources()) == [f"snapshots/{w.SNAPSHOT}/rows.jsonl"]
    entry = chain.to_json()[-1]
    assert (
        entry["asset"] == "dataset/raw_rows"
        and entry["path"] == str(branch["raw_rows"].path)
        and entry["counts"] == {"rows": 22}
    )
    assert json.dumps(chain.to_json())
    text = shown(print_chain, chain)
    assert "recipe/exported_model" in text and f"snapshots/{w.SNAPSHOT}/rows.jsonl" in text


def test_a_folder_inside_the_export_and_any_other_artifact_will_do(project, branch):
    assert walk(branch["exported_model"].file("merged"), project.store).root == branch["exported_model"].path
    assert [n.stage for n in walk(branch["grouped_split"].path, project.store).nodes] == [
        "grouped_split",
        "validated_rows",
        "raw_rows",
    ]


def test_a_folder_that_is_no_artifact(tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json here"):
        walk(tmp_path)


# -- verify ------------------------------------------------------------------------------------------------


def test_an_untouched_chain_is_verified(project, branch):
    found = verify(branch["exported_model"].path, project.store)
    assert found.verified and not found.findings and not found.unreachable
    assert found.files > 20 and found.bytes > 10_000
    assert "verified" in shown(print_verification, found)
    assert json.dumps(found.to_json())


FILES = (
    "exported_model:merged/model.safetensors",
    "exported_model:README.md",
    "exported_model:lineage/chain.json",
    "trained_checkpoints:training.json",
    "tokenized_rows:train/part-00000.parquet",
    "grouped_split:test/part-00000.parquet",
    "validated_rows:quarantine.parquet",
    "raw_rows:rows/part-00000.parquet",
    "evaluation:evaluation.json",
    "packed_shards:plan.parquet",
)


@pytest.mark.parametrize("place", FILES)
def test_one_flipped_byte_anywhere_in_the_chain_is_named(project, branch, flipped, place):
    stage, name = place.split(":")
    folder = (
        branch[stage].path
        if stage in branch
        else next(
            n.path for n in walk(branch["exported_model"].path, project.store).nodes if n.stage == stage
        )
    )
    path = flipped(folder / name)
    found = verify(branch["exported_model"].path, project.store)
    assert not found.verified and [f.file for f in found.findings] == [str(path)]
    assert str(path) in shown(print_verification, found)


@pytest.mark.parametrize("name", [f"snapshots/{w.SNAPSHOT}/rows.jsonl", "base/model.safetensors"])
def test_a_flipped_byte_outside_the_store_is_named(project, branch, flipped, name):
    path = flipped(project.root / name)
    found = verify(branch["exported_model"].path, project.store)
    assert not found.verified and {f.file for f in found.findings} == {str(path)}


@pytest.mark.parametrize("stage", ["exported_model", "trained_checkpoints", "raw_rows"])
def test_every_byte_of_a_manifest_counts(project, branch, flipped, stage):
    path = branch[stage].path / "manifest.json"
    size = path.stat().st_size
    for at in range(0, size, max(1, size // 25)):
        flipped(path, at)
        found = verify(branch["exported_model"].path, project.store)
        assert not found.verified and str(path) in {f.file for f in found.findings}, at


def test_missing_and_added_files_are_named(project, branch):
    folder = branch["evaluation"].path
    (folder / "samples.parquet").rename(folder / "samples2.parquet")
    try:
        found = verify(branch["exported_model"].path, project.store)
    finally:
        (folder / "samples2.parquet").rename(folder / "samples.parquet")
    assert {(f.file, f.problem.split(":")[0]) for f in found.findings} == {
        (str(folder / "samples.parquet"), "missing"),
        (str(folder / "samples2.parquet"), "not a file of recipe/evaluation"),
    }


def test_a_moved_copy_is_verified_by_its_own_lineage(project, branch, tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere"
    shutil.copytree(branch["exported_model"].path, copy)
    with_store = verify(copy, project.store)
    assert with_store.verified and not with_store.unreachable
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(tmp_path / "another machine"))
    alone = verify(copy, Store(tmp_path / "empty"))
    assert (
        alone.verified and len(alone.unreachable) == 7 + 2 + 1
    )  # upstream artifacts' files; source and base; no record of the model itself
    assert any(
        "dataset/raw_rows" in line and "only its manifest was checked" in line for line in alone.unreachable
    )
    path = next((copy / "lineage").glob("raw_rows-*.json"))
    path.write_text(path.read_text().replace('"rows": 22', '"rows": 23'))
    assert [f.file for f in verify(copy, Store(tmp_path / "empty")).findings] == [str(path)]


def test_a_moved_copy_in_another_project_with_files_of_the_same_names(project, branch, tmp_path, monkeypatch):
    copy, other = tmp_path / "elsewhere", tmp_path / "other project"
    shutil.copytree(branch["exported_model"].path, copy)
    (other / "base").mkdir(parents=True)
    (other / "base" / "model.safetensors").write_text("another base")
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(other))
    found = verify(copy, Store(tmp_path / "empty"))
    assert found.verified, found.findings
    assert any("another file is at this place" in line for line in found.unreachable)


def test_what_cannot_be_read_does_not_end_the_verification(project, branch):
    """A link to itself, which nobody can read, whatever they may."""
    outside, own = project.root / "base" / "model.safetensors", branch["evaluation"].file("samples.parquet")
    for path in (outside, own):
        path.rename(path.with_name("aside"))
        path.symlink_to(path)
    try:
        found = verify(branch["exported_model"].path, project.store)
    finally:
        for path in (outside, own):
            path.with_name("aside").replace(path)
    assert any(str(outside) in line and "cannot be read" in line for line in found.unreachable)
    assert (str(own), "it cannot be read") in {(f.file, f.problem.partition(" (")[0]) for f in found.findings}


def test_another_artifact_under_the_recorded_fingerprint_is_found(project, branch):
    """An upstream artifact rebuilt with other content, consistent in itself: the consumer's record shows."""
    path = branch["validated_rows"].path / "manifest.json"
    before = path.read_text()
    from sft_pipeline.store import Manifest

    changed = Manifest.read(path).model_copy(update={"data_version": "0" * 64})
    path.write_text(json.dumps(changed.to_json(), indent=2, ensure_ascii=False) + "\n")
    try:
        found = verify(branch["exported_model"].path, project.store)
    finally:
        path.write_text(before)
    assert any("was made from validated_rows with the data version" in f.problem for f in found.findings)


def test_what_is_gone_is_unreachable_and_not_silently_verified(project, branch):
    folder = (
        branch["packed"]
        if "packed" in branch
        else next(
            n.path
            for n in walk(branch["exported_model"].path, project.store).nodes
            if n.stage == "packed_shards"
        )
    )
    folder.rename(folder.with_name("aside"))
    try:
        found = verify(branch["exported_model"].path, project.store)
    finally:
        folder.with_name("aside").rename(folder)
    assert found.verified and len(found.unreachable) == 1 and "recipe/packed_shards" in found.unreachable[0]


# -- trace -------------------------------------------------------------------------------------------------


def test_a_trained_group_is_traced_from_its_lines_to_the_model(project, branch):
    found = trace("T1", project.store)  # rows 2 and 3; checkpoint 7 has seen updates 1 to 7, one block each
    assert found.row_ids == sorted(r["row_id"] for r in TRAIN[2:4])
    assert [(s["file"], s["line"]) for s in found.sources] == [("rows.jsonl", 3), ("rows.jsonl", 4)]
    places = [(a["asset"], a["side"], a["rows"]) for a in found.artifacts]
    assert places == [
        ("dataset/raw_rows", None, 2),
        ("dataset/validated_rows", None, 2),
        ("dataset/grouped_split", "train", 2),
        ("recipe/tokenized_rows", "train", 2),
        ("recipe/packed_shards", "train", 2),
    ]
    assert [(b["block"], b["updates"]) for b in found.blocks] == [(2, [3]), (3, [4])]
    assert [(m["asset"], m["step"], m["updates"]) for m in found.models] == [
        ("recipe/exported_model", 7, [3, 4])
    ]
    text = shown(print_trace, found)
    assert "was trained on it" in text and "rows.jsonl" in text
    assert {"models", "blocks", "artifacts", "sources"} <= set(found.to_json())


def test_a_row_id_a_row_seen_too_late_and_a_held_out_group(project, branch):
    one = trace(TRAIN[0]["row_id"], project.store)
    assert one.row_ids == [TRAIN[0]["row_id"]] and one.models
    late = trace(TRAIN[9]["row_id"], project.store)
    assert late.blocks[0]["updates"] == [10] and not late.models
    held_out = trace(TEST[0]["group"], project.store)
    assert (
        {a["side"] for a in held_out.artifacts} == {None, "test"}
        and not held_out.blocks
        and not held_out.models
    )
    assert "no exported model of this store was trained on it" in shown(print_trace, held_out)


def test_quarantined_rows_and_unknown_keys(project, branch):
    bad = trace("bad1", project.store)
    assert [(a["asset"], a["note"]) for a in bad.artifacts] == [
        ("dataset/validated_rows", "in quarantine.parquet: empty_completion")
    ]
    nothing = trace("no such group", project.store)
    assert not nothing.found and nothing.row_ids == [] and "in no artifact" in shown(print_trace, nothing)


def test_parts_of_a_split_row_are_found_by_the_rows_own_id(project, branch, tmp_path):
    store = Store(tmp_path / "home")
    shutil.copytree(project.store.objects, store.objects)
    part = store.objects / branch["tokenized_rows"].path.name / "train" / "part-00000.parquet"
    table = pq.read_table(part)
    ids = table.column("row_id").to_pylist()
    ids[1] = ids[0] + "/1"
    pq.write_table(table.set_column(0, "row_id", [ids]), part)
    found = trace(ids[0], store)
    assert next(a["rows"] for a in found.artifacts if a["asset"] == "recipe/tokenized_rows") == 2


def test_a_damaged_artifact_hides_only_what_it_holds(project, branch, tmp_path):
    store = Store(tmp_path / "home")
    shutil.copytree(project.store.objects, store.objects)
    part = store.objects / branch["tokenized_rows"].path.name / "train" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:40])
    (store.objects / branch["grouped_split"].path.name / "manifest.json").write_text("{]")
    lines = []
    report = Reporter()
    report.log = lambda message, level="info": lines.append(message)
    found = trace("T1", store, report)
    assert {"dataset/raw_rows", "recipe/packed_shards"} <= {a["asset"] for a in found.artifacts}
    assert len(lines) == 2 and all(
        word in line for word, line in zip(("manifest.json", str(part.parent.parent)), lines)
    )


def test_names_of_files_cannot_forge_what_is_printed(project, branch):
    from sft_pipeline.cli.console import Terminal
    from sft_pipeline.lineage.verify import Finding, Verification

    name = "x[/red][bold]\x1b[2Jverified\n verified: 9 files\udce9"
    found = Verification(False, (Finding(name, "missing"),), (name,), 1, 1)
    stream = io.StringIO()
    print_verification(found, Terminal(file=stream, width=100, force_terminal=False))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[-1].startswith("not verified")
    assert r"x[/red][bold]\x1b[2Jverified\n verified: 9 files\udce9: missing" in lines[0]
    assert "\x1b" not in stream.getvalue() and stream.getvalue().encode()

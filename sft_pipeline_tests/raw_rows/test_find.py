"""Every file of a snapshot is read, listed as not data, or refused by name; links are followed."""

import json
import os
from pathlib import Path

import fsspec
import pytest
from datasets import Dataset, DatasetDict

from sft_pipeline import bounded
from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.asset import STAGE
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.raw_rows.find import Found, find_files
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline_tests.dataset_runs import dataset, project, rows, run
from sft_pipeline_tests.raw_rows.test_readers import JSONL, ROWS, contents, put, read

__all__ = ["project"]


def find(path: Path | str) -> Found:
    return find_files(RawSource(path=str(path), static=True), "")


def names(path: Path | str) -> list[str]:
    return [f.name for f in find(path).files]


def test_a_glob_that_does_not_finish_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    put(tmp_path, "a" * 200 + ".jsonl", JSONL)
    with pytest.raises(InputError, match=r"the pattern of a source's path .*did not finish"):
        find(f"{tmp_path}/{'*a' * 20}*b.jsonl")


def test_names_that_cannot_be_written_down_are_told(project: Path) -> None:
    bad = ("z" * 250, os.fsdecode(b"\xff"), "a\nb", "\x1b[31mred", "a...b")
    for name in ("2026-01", "[red]", "-x", "a b", "é", *bad):
        put(project, f"s/{name}/rows.jsonl", JSONL)
    config, told = dataset({"path": "s", "static": False}), []
    assert snapshots(config.sources, told.append) == ["-x", "2026-01", "[red]", "a b", "é"]
    assert len(told) == len(bad) and all(any(repr(name) in each for each in told) for name in bad)
    for name in ("[red]", "-x"):
        assert run(config, project / name, STAGE, name)["raw_rows"].artifact.manifest.accepted
    for name in (*bad, "a/b", "..", "../s/2026-01"):
        with pytest.raises(InputError, match=r"no snapshot .*: the name"):
            run(config, project / "home", STAGE, name)
    put(project, f"t/{os.fsdecode(bytes([0xFE]))}.jsonl", JSONL)
    with pytest.raises(InputError, match=r"the name of the file '.*\\udcfe.jsonl' is not UTF-8"):
        find("t")


def test_a_folder_a_glob_and_a_url(tmp_path: Path) -> None:
    put(tmp_path, "b/two.jsonl", JSONL)
    put(tmp_path, "a.jsonl", JSONL)
    assert names(tmp_path) == ["a.jsonl", "b/two.jsonl"]
    assert contents(tmp_path) == ROWS * 2
    assert names(f"{tmp_path}/*/*.jsonl") == ["b/two.jsonl"]
    assert names(f"{tmp_path}/*.jsonl") == ["a.jsonl"]
    assert names(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "b/two.jsonl"]
    with fsspec.open("memory://rows/one.jsonl", "wb") as stream:
        stream.write(JSONL)
    assert contents("memory://rows") == ROWS
    assert contents(f"file://{tmp_path}/a.jsonl") == ROWS


NOT_DATA = {
    "README.md": "documentation",
    "b/LICENSE": "documentation",
    "notes.md": "documentation",
    ".hidden.jsonl": "hidden: the name begins with a dot",
    ".cache/": "hidden: the name begins with a dot",
    "dataset_infos.json": "metadata of `datasets`",
    "_SUCCESS": "a writer's mark",
    "a.jsonl.lock": "a writer's mark",
    "a.jsonl.sha256": "checksums",
    "SHA256SUMS": "checksums",
}


def test_what_is_not_data_is_listed_with_the_rule(project: Path) -> None:
    put(project, "s/1/a.jsonl", JSONL)
    for name in NOT_DATA:
        put(project, f"s/1/{name}x.json" if name.endswith("/") else f"s/1/{name}", '{"no": "row"}')
    built = run(dataset({"path": "s", "static": False}), project / "home", STAGE)["raw_rows"].artifact
    assert len(rows(built, "rows")) == len(ROWS)
    assert built.manifest.counts["not_data"] == len(NOT_DATA)
    assert list(built.manifest.outside) == ["s/1/a.jsonl"]
    listed = json.loads((built.path / "report.json").read_text())["evidence"]["files_not_data"]["value"]
    assert {r["file"]: r["why"] for r in listed} == {f"s/1/{n}": rule for n, rule in NOT_DATA.items()}


@pytest.mark.parametrize("name", ["notes.txt", "b/rows.pkl", "rows.parquet.gz", "rows.xlsx", "rows"])
def test_any_other_file_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    put(tmp_path, "a.jsonl", JSONL)
    put(tmp_path, name, "x")
    with pytest.raises(InputError, match=f"no reader for {tmp_path}/{name}: move what is not data"):
        find(tmp_path)
    assert names(f"{tmp_path}/*.jsonl") == ["a.jsonl"]


def test_a_readable_ending_makes_a_file_data_whatever_its_name_begins_with(tmp_path: Path) -> None:
    for name in ("license_questions.jsonl", "readme.csv", "_rows.jsonl"):
        put(tmp_path, name, "")
    assert names(tmp_path) == ["_rows.jsonl", "license_questions.jsonl", "readme.csv"]


def test_links_are_followed(project: Path) -> None:
    put(project, "elsewhere/1/rows.jsonl", JSONL)
    put(project, "elsewhere/blob", JSONL)
    (project / "s").mkdir()
    (project / "s" / "1").symlink_to(project / "elsewhere" / "1")
    (project / "elsewhere" / "1" / "more").mkdir()
    (project / "elsewhere" / "1" / "more" / "rows.jsonl").symlink_to("../../blob")
    put(project, "s/2/own.jsonl", JSONL)
    (project / "s" / "2" / "linked").symlink_to("../1")
    config = dataset({"path": "s", "static": False})
    assert snapshots(config.sources) == ["1", "2"]
    for snapshot, files in (("1", 2), ("2", 3)):
        built = run(config, project / "home", STAGE, snapshot)["raw_rows"].artifact
        assert built.manifest.counts["files"] == files and built.manifest.counts["rows"] == files * len(ROWS)
    assert list(built.manifest.outside) == [
        "s/2/linked/more/rows.jsonl",
        "s/2/linked/rows.jsonl",
        "s/2/own.jsonl",
    ]
    assert names("s/*/rows.jsonl") == ["1/rows.jsonl"]
    assert contents("s/1/more/rows.jsonl") == ROWS


def test_a_link_that_cannot_be_followed_is_refused_by_name(project: Path) -> None:
    put(project, "s/1/rows.jsonl", JSONL)
    (project / "s/1/again").symlink_to("..")
    put(project, "flat/rows.jsonl", JSONL)
    (project / "flat/again").symlink_to(".")
    with pytest.raises(InputError, match="flat/again is a link to a folder that it lies in"):
        find("flat")
    with pytest.raises(InputError, match="s/1/again/1 is a link to a folder"):
        find_files(RawSource(path="s"), "1")
    assert names("flat/*.jsonl") == ["rows.jsonl"]
    (project / "flat/again").unlink()
    (project / "flat/gone.jsonl").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"flat/gone\.jsonl is a link that leads nowhere"):
        find("flat")
    (project / "s/2").symlink_to("nowhere")
    with pytest.raises(InputError, match="s/2 is a link that leads nowhere"):
        snapshots(dataset({"path": "s", "static": False}).sources)


def test_a_pipe_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, "rows.jsonl", JSONL)
    os.mkfifo(tmp_path / "more.jsonl")
    with pytest.raises(InputError, match=r"more\.jsonl is neither a file nor a folder"):
        find(tmp_path)


def test_a_missing_path_names_itself_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.jsonl does not exist .*Check `path`"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="no file to read"):
        read(put(tmp_path, "only/README.md", "x").parent)
    with pytest.raises(InputError, match="no reader for this file"):
        read(put(tmp_path, "rows.txt", "x"))


def test_a_folder_of_save_to_disk_is_read_in_its_own_order(project: Path) -> None:
    saved = project / "saved"
    Dataset.from_list(ROWS).save_to_disk(saved, num_shards=3)
    assert contents(saved) == ROWS
    put(saved, "cache-0123456789abcdef.arrow", "a map's cache")
    state = json.loads((saved / "state.json").read_text())
    state["_data_files"].reverse()
    put(saved, "state.json", json.dumps(state))
    found = find(saved)
    assert [f.name[5:10] for f in found.files] == ["00002", "00001", "00000"]
    assert found.not_data[f"{saved}/cache-0123456789abcdef.arrow"] == "not named by state.json"
    built = run(dataset(saved), project / "home", STAGE)["raw_rows"].artifact
    assert f"{saved}/state.json" in built.manifest.outside
    (saved / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match=r"data-00001-of-00003\.arrow is missing, though"):
        find(saved)
    put(saved, "state.json", "{}")
    with pytest.raises(InputError, match=r"state\.json: not the state of a data set"):
        find(saved)


def test_a_saved_dict_of_splits_is_a_folder_of_folders(tmp_path: Path) -> None:
    splits = DatasetDict(test=Dataset.from_list(ROWS[:2]), train=Dataset.from_list(ROWS[2:]))
    splits.save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "saved") == ROWS
    assert set(find(tmp_path / "saved").not_data.values()) == {"metadata of `datasets`"}
    assert contents(tmp_path / "saved" / "train") == ROWS[2:]

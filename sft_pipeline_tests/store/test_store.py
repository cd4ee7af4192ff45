"""Artifacts are whole or absent, reused by fingerprint, and a changed byte is found."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.store import Store
from sft_pipeline.store.files import clear_disk_errors

FINGERPRINT = "f" * 64


FIELDS = {
    "asset": "a/rows",
    "partition": "s1",
    "code_version": "c",
    "config": {},
    "inputs": {},
    "accepted": True,
    "counts": {"rows": 1},
    "environment": {},
}


def put(store: Store, fingerprint: str = FINGERPRINT, content: str = "one", log: str = "now"):
    with store.building(fingerprint) as folder:
        (folder / "rows").mkdir()
        (folder / "rows" / "part.txt").write_text(content)
        (folder / "log.txt").write_text(log)
        return store.commit(folder, volatile=("log.txt",), fields=FIELDS)


def test_a_committed_artifact_is_found_intact_and_its_staging_is_gone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artifact = put(store)
    assert store.get(FINGERPRINT) == artifact
    assert artifact.damage(deep=True) == []
    assert not list(store.staging.iterdir())
    raw = json.loads((artifact.path / "manifest.json").read_text())
    assert [(f["path"], f.get("volatile", False)) for f in raw["files"]] == [
        ("log.txt", True),
        ("rows/part.txt", False),
    ]


def test_the_data_version_covers_what_is_not_volatile(tmp_path: Path) -> None:
    versions = [
        put(Store(tmp_path / name), content=content, log=log).manifest.data_version
        for name, content, log in (("a", "one", "x"), ("b", "one", "y"), ("c", "two", "x"))
    ]
    assert versions[0] == versions[1] != versions[2]


def test_a_changed_byte_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path))
    target = artifact.file("rows/part.txt")
    target.write_text("onf")
    later = artifact.file("manifest.json").stat().st_mtime + 10
    os.utime(target, (later, later))
    with pytest.raises(InputError, match=r"rows/part\.txt"):
        artifact.verify()
    before = later - 20
    os.utime(target, (before, before))  # the same size and an old time: only the hash tells
    artifact.verify()
    with pytest.raises(InputError, match=r"rows/part\.txt"):
        artifact.verify(deep=True)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    artifact = put(Store(tmp_path))
    artifact.file("rows/part.txt").unlink()
    with pytest.raises(InputError, match=r"rows/part\.txt: missing"):
        artifact.verify()


def test_a_full_disk_is_one_message_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sft_pipeline.store.files.fsync_tree", full)
    with pytest.raises(InputError, match="no space left"), clear_disk_errors("building a/rows"):
        put(store)
    assert store.get(FINGERPRINT) is None
    assert not store.objects.exists() or not list(store.objects.iterdir())
    assert not list(store.staging.iterdir())


def _die_while_building(home: str) -> None:
    with Store(Path(home)).building(FINGERPRINT) as folder:
        (folder / "half.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_builder_leaves_no_object_and_its_staging_is_swept(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_die_while_building, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    store = Store(tmp_path)
    assert store.get(FINGERPRINT) is None
    assert (store.staging / FINGERPRINT / "half.txt").exists()
    assert store.sweep() == [FINGERPRINT]
    assert not list(store.staging.iterdir())


def test_an_artifact_whose_successor_never_came_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    first = put(store)
    replace, calls = os.replace, []

    def die_at_the_second(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            calls.append(source)
            if len(calls) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die_at_the_second)
        put(store, content="two")
    assert store.get(FINGERPRINT) is None
    store.sweep()
    assert store.get(FINGERPRINT) == first and first.damage(deep=True) == []
    assert not list(store.staging.iterdir())
    assert put(store, content="two").file("rows/part.txt").read_text() == "two"


def _build_once_somebody_waits(home: str, started: str, waiting: str) -> None:
    with Store(Path(home)).building(FINGERPRINT) as folder:
        Path(started).touch()
        while not Path(waiting).exists():
            time.sleep(0.01)
        (folder / "a.txt").write_text("a")
        Store(Path(home)).commit(folder, volatile=(), fields=FIELDS)


def test_a_second_builder_waits_and_nothing_in_use_is_swept(tmp_path: Path) -> None:
    store, started, waiting = Store(tmp_path / "home"), tmp_path / "started", tmp_path / "waiting"
    process = multiprocessing.get_context("spawn").Process(
        target=_build_once_somebody_waits, args=(str(store.home), str(started), str(waiting))
    )
    process.start()
    while not started.exists():
        time.sleep(0.01)
    assert store.sweep() == []
    with store.building(FINGERPRINT, waiting.touch):
        assert store.get(FINGERPRINT) is not None
    process.join(60)
    assert process.exitcode == 0 and waiting.exists()


def test_refs_prefer_what_this_run_made(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second = put(store), put(store, "e" * 64, "two")
    store.set_ref(first, run_id="r1", current=True)
    store.set_ref(second, run_id="r2", current=False)
    assert store.resolve("a/rows", "s1") == first
    assert store.resolve("a/rows", "s1", ["r2"]) == second
    assert store.resolve("a/rows", "s1", ["r3"]) == first
    assert store.resolve("a/rows", "s2") is None


def test_an_unreadable_manifest_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store).file("manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json"):
        _ = store.get(FINGERPRINT).manifest

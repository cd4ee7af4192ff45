"""The digest that is recorded for a file is that of the bytes that were read, or nothing is committed."""

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.raw_rows.asset import STAGE
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Store
from sft_pipeline.store.files import sha256_file
from sft_pipeline_tests.dataset_runs import dataset, project, rows, run
from sft_pipeline_tests.raw_rows.test_readers import put

__all__ = ["project"]
MANY = [{"prompt": f"{i:08d}" * 40, "completion": "x"} for i in range(30_000)]  # 10 MB


class Meddler(Reporter):
    """Does something once, when the reading has come some way."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self._act: Callable[[], Any] | None = act

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        if self._act and done:
            self._act()
            self._act = None


def read_while(path: Path, home: Path, act: Callable[[], Any]) -> None:
    config = (
        dataset({"path": path.parent.name, "static": False}) if path.parent.name == "1" else dataset(path)
    )
    branch = Branch(config, snapshots(config.sources)[-1])
    old = time.time() - 60
    os.utime(path, (old, old))
    run_stage(STAGE, {}, branch, Run(Store(home), Meddler(act)))


def edit_in_place(path: Path) -> None:
    """Another byte near the end, the same size, and the time put back."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-30, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-30, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shorten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.read_bytes().rindex(b"\n", 0, -2) + 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b'{"prompt": "late", "completion": "x"}\n')


def swap(path: Path) -> None:
    """Another file under the same name; the one that is open stays as it was."""
    path.rename(path.with_name("old.jsonl"))
    path.write_bytes(b'{"prompt": "new"}\n')


@pytest.mark.parametrize("change", [edit_in_place, shorten, lengthen, swap, Path.unlink])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    project: Path, name: str, change: Callable[[Path], None]
) -> None:
    text = "".join(json.dumps(r) + "\n" for r in MANY)
    if name == "rows.json":
        text = "[" + ",\n".join(json.dumps(r) for r in MANY) + "]"
    path = put(project, name, gzip.compress(text.encode(), 0) if name.endswith("gz") else text)
    with pytest.raises(InputError, match=name) as error:
        read_while(path, project / "home", lambda: change(path))
    if change is edit_in_place and name != "rows.jsonl.gz":
        assert "changed while it was read" in str(error.value)
    assert not list((project / "home" / "objects").glob("*"))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
@pytest.mark.parametrize("change", [edit_in_place, lengthen, swap])
def test_a_table_that_changes_while_it_is_read_is_refused(
    project: Path, name: str, change: Callable[[Path], None]
) -> None:
    path = project / name
    table = pa.Table.from_pylist(MANY)
    if name == "rows.parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    with pytest.raises(InputError, match=rf"{name} changed while it was read, and nothing of it was kept"):
        read_while(path, project / "home", lambda: change(path))
    assert not list((project / "home" / "objects").glob("*"))


def test_permissions_and_times_are_no_change(project: Path) -> None:
    path = put(project, "rows.jsonl", "".join(json.dumps(r) + "\n" for r in MANY))

    def touch() -> None:
        path.chmod(0o600)
        os.utime(path)

    read_while(path, project / "home", touch)
    (built,) = Store(project / "home").all()
    assert list(built.manifest.outside.values()) == [sha256_file(path)]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda folder: put(folder, "more.jsonl", '{"a": 2}\n'), r"s/1/more\.jsonl came or went"),
        (lambda folder: (folder / "two.jsonl").unlink(), r"s/1/two\.jsonl came or went"),
        (lambda folder: put(folder, "one.jsonl", '{"a": 3}\n'), r"s/1/one\.jsonl changed while"),
    ],
)
def test_a_change_between_the_fingerprint_and_the_reading_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], Any], message: str
) -> None:
    put(project, "s/1/one.jsonl", '{"a": 1}\n')
    put(project, "s/1/two.jsonl", '{"a": 2}\n')
    building = Store.building

    def building_late(self: Store, *args: Any, **rest: Any) -> Any:
        act(project / "s/1")
        return building(self, *args, **rest)

    monkeypatch.setattr(Store, "building", building_late)
    with pytest.raises(InputError, match=message):
        run(dataset({"path": "s", "static": False}), project / "home", STAGE)
    assert not list((project / "home" / "objects").glob("*"))


def test_an_edit_of_the_same_size_and_time_is_read_again(project: Path) -> None:
    path = put(project, "s/1/rows.jsonl", '{"prompt": "a", "completion": "1234567890123456"}\n')
    old = time.time() - 60
    os.utime(path, (old, old))
    time.sleep(2.1)  # old enough for its digest to be kept
    config = dataset({"path": "s", "static": False})
    first = run(config, project / "home", STAGE)["raw_rows"].artifact
    assert digest_file(path) == sha256_file(path)
    edit_in_place(path)
    assert digest_file(path) == sha256_file(path)
    second = run(config, project / "home", STAGE)["raw_rows"].artifact
    assert rows(first, "rows")[0]["content"] != rows(second, "rows")[0]["content"]
    assert second.manifest.outside == {"s/1/rows.jsonl": sha256_file(path)}


def test_a_local_hub_folder_that_changes_is_refused(project: Path) -> None:
    path = put(project, "ds/train.jsonl", "".join(json.dumps(r) + "\n" for r in MANY[:2_000]))
    config = dataset({"path": "hf://ds@v1"})
    branch = Branch(config, snapshots(config.sources)[-1])
    with pytest.raises(InputError, match=r"ds/train.jsonl changed while it was read"):
        run_stage(STAGE, {}, branch, Run(Store(project / "home"), Meddler(lambda: edit_in_place(path))))
    assert not list((project / "home" / "objects").glob("*"))

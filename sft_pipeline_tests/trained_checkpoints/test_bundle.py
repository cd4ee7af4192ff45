"""A checkpoint is whole or not there."""

import errno
import json
import shutil

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints import bundle
from sft_pipeline.stages.trained_checkpoints.bundle import (
    ITEMS,
    NotResumable,
    checkpoint_folders,
    latest_whole,
    read_bundle,
    retire,
    write_bundle,
)

FILES = {
    "model": "model.safetensors",
    "optimizer": "optimizer.safetensors",
    "scheduler": "scheduler.json",
    "rng": "rng.json",
}


def write(parent, step, fail=None):
    def files(folder):
        for name in FILES.values():
            (folder / name).write_text(f"{name} at {step}")
        if fail:
            raise fail
        return {item: [name] for item, name in FILES.items()}

    return write_bundle(
        parent,
        step,
        files,
        {i: {"of": step} for i in ITEMS if i not in FILES and i != "global_step"} | {"global_step": step},
    )


class Lines(Reporter):
    def __init__(self):
        self.lines = []

    def log(self, message, level="info"):
        self.lines.append(message)


def test_what_is_written_is_read_back_and_verified(tmp_path):
    found = read_bundle(write(tmp_path, 200))
    assert (
        found.step == 200 and set(found.items) == set(ITEMS) and found.value("data_manifest") == {"of": 200}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-200"]


@pytest.mark.parametrize("item", ITEMS)
def test_a_resume_bundle_missing_any_of_the_eleven_items_is_not_resumable(tmp_path, item):
    """Worked example."""
    path = write(tmp_path, 200)
    data = json.loads((path / "bundle.json").read_text())
    del data["items"][item]
    (path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(NotResumable, match=item):
        read_bundle(path)
    report = Lines()
    assert latest_whole(tmp_path, report) is None and item in report.lines[0]


def test_there_are_eleven():
    assert len(ITEMS) == len(set(ITEMS)) == 11


@pytest.mark.parametrize("item", FILES)
@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_missing_or_changed_file_is_found_and_named(tmp_path, item, harm):
    write(tmp_path, 100)
    path = write(tmp_path, 200) / FILES[item]
    if harm == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    with pytest.raises(NotResumable, match=FILES[item]):
        read_bundle(tmp_path / "checkpoint-200")
    report = Lines()
    assert latest_whole(tmp_path, report).step == 100
    assert FILES[item] in report.lines[0]


def test_half_written_and_foreign_folders_are_passed_over(tmp_path):
    write(tmp_path, 100)
    half = tmp_path / "checkpoint-300"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    (tmp_path / ".checkpoint-400.partial").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    report = Lines()
    assert latest_whole(tmp_path, report).step == 100
    assert "never finished" in report.lines[0]
    write(tmp_path, 300)
    assert latest_whole(tmp_path, report).step == 300


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_stops_with_one_message_and_the_previous_checkpoint_intact(tmp_path, error):
    write(tmp_path, 100)
    with pytest.raises(InputError, match=r"no space left on the disk while saving .*checkpoint-200"):
        write(tmp_path, 200, fail=error)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-100"]
    assert read_bundle(tmp_path / "checkpoint-100").step == 100


def test_a_disk_that_fills_up_while_flushing_leaves_nothing_either(tmp_path, monkeypatch):
    write(tmp_path, 100)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle, "fsync_tree", full)
    with pytest.raises(InputError):
        write(tmp_path, 200)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-100"]


def test_an_item_cannot_be_forgotten_when_writing(tmp_path):
    with pytest.raises(ValueError, match="rng"):
        write_bundle(tmp_path, 1, lambda folder: {}, {i: 1 for i in ITEMS if i != "rng"})
    assert not list(tmp_path.iterdir())


def test_retirement_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (100, 200, 300, 400, 500):
        write(tmp_path, step)
    assert retire(tmp_path, None, 200) == []
    assert retire(tmp_path, 2, 200) == [100, 300]
    assert [p.name for p in checkpoint_folders(tmp_path)] == [
        "checkpoint-200",
        "checkpoint-400",
        "checkpoint-500",
    ]


def test_bundles_do_not_depend_on_where_they_are(tmp_path):
    a, b = write(tmp_path / "a", 7), write(tmp_path / "b", 7)
    assert (a / "bundle.json").read_bytes() == (b / "bundle.json").read_bytes()
    shutil.move(a, tmp_path / "elsewhere")
    assert read_bundle(tmp_path / "elsewhere").step == 7

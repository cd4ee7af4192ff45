"""A checkpoint is whole or not there."""

import errno
import json
import shutil

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.training import checkpoint
from sft_pipeline.training.checkpoint import (
    REQUIRED_ITEMS,
    NotResumable,
    checkpoint_folders,
    latest_checkpoint,
    read_checkpoint,
    retire_checkpoints,
    write_checkpoint,
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

    return write_checkpoint(
        parent,
        step,
        files,
        {i: {"of": step} for i in REQUIRED_ITEMS if i not in FILES and i != "global_step"}
        | {"global_step": step},
    )


class Lines(Reporter):
    def __init__(self):
        self.lines = []

    def log(self, message, level="info"):
        self.lines.append(message)


def test_what_is_written_is_read_back_and_verified(tmp_path):
    found = read_checkpoint(write(tmp_path, 200))
    assert (
        found.step == 200
        and set(found.items) == set(REQUIRED_ITEMS)
        and found.value("data_manifest") == {"of": 200}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-200"]


@pytest.mark.parametrize("item", REQUIRED_ITEMS)
def test_a_checkpoint_missing_any_of_its_required_items_is_not_resumable(tmp_path, item):
    """Worked example."""
    path = write(tmp_path, 200)
    data = json.loads((path / "bundle.json").read_text())
    del data["items"][item]
    (path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(NotResumable, match=item):
        read_checkpoint(path)
    report = Lines()
    assert latest_checkpoint(tmp_path, report) is None and item in report.lines[0]


def test_eleven_items_are_required():
    assert len(REQUIRED_ITEMS) == len(set(REQUIRED_ITEMS)) == 11


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
        read_checkpoint(tmp_path / "checkpoint-200")
    report = Lines()
    assert latest_checkpoint(tmp_path, report).step == 100
    assert FILES[item] in report.lines[0]


def test_half_written_and_foreign_folders_are_passed_over(tmp_path):
    write(tmp_path, 100)
    half = tmp_path / "checkpoint-300"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    (tmp_path / ".checkpoint-400.partial").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    report = Lines()
    assert latest_checkpoint(tmp_path, report).step == 100
    assert "never finished" in report.lines[0]
    write(tmp_path, 300)
    assert latest_checkpoint(tmp_path, report).step == 300


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
    assert read_checkpoint(tmp_path / "checkpoint-100").step == 100


def test_a_disk_that_fills_up_while_flushing_leaves_nothing_either(tmp_path, monkeypatch):
    write(tmp_path, 100)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync_tree", full)
    with pytest.raises(InputError):
        write(tmp_path, 200)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-100"]


def test_an_item_cannot_be_forgotten_when_writing(tmp_path):
    with pytest.raises(ValueError, match="rng"):
        write_checkpoint(tmp_path, 1, lambda folder: {}, {i: 1 for i in REQUIRED_ITEMS if i != "rng"})
    assert not list(tmp_path.iterdir())


def test_retire_checkpointsment_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (100, 200, 300, 400, 500):
        write(tmp_path, step)
    assert retire_checkpoints(tmp_path, None, 200) == []
    assert retire_checkpoints(tmp_path, 2, 200) == [100, 300]
    assert [p.name for p in checkpoint_folders(tmp_path)] == [
        "checkpoint-200",
        "checkpoint-400",
        "checkpoint-500",
    ]


def test_checkpoints_do_not_depend_on_where_they_are(tmp_path):
    a, b = write(tmp_path / "a", 7), write(tmp_path / "b", 7)
    assert (a / "bundle.json").read_bytes() == (b / "bundle.json").read_bytes()
    shutil.move(a, tmp_path / "elsewhere")
    assert read_checkpoint(tmp_path / "elsewhere").step == 7

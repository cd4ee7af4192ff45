"""Bad input gives one clear message and a documented exit code, no traceback, and nothing half-written."""

import gzip
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sft_pipeline_tests.branches import GOOD_ROWS, SNAPSHOT
from sft_pipeline_tests.command import Ran, sft, sft_process

LINES = "".join(json.dumps(r) + "\n" for r in GOOD_ROWS).encode()


def check_failure(ran: Ran, home: Path, code: int, *words: str) -> None:
    """The exit code, each word in the message, and no half-written artifact."""
    assert ran.code == code, ran.stderr[-3000:]
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr, ran.stderr[-3000:]
    assert not list(home.glob("staging/*"))
    assert all((folder / "manifest.json").is_file() for folder in home.glob("objects/*"))


def run(folder: Path, tmp_path: Path, *more: str, until: str = "packed_shards") -> tuple[Ran, Path]:
    home = tmp_path / "home"
    return sft("run", "small_lora", "--json", "--until", until, *more, home=home, config=folder), home


def test_a_missing_folder_as_a_user_meets_it(branch: Callable[..., Path], tmp_path: Path) -> None:
    """In a process of its own, for its exit status, and its stdout: one JSON object and nothing else."""
    folder = branch(dataset={"sources": [{"path": str(tmp_path / "nowhere")}]})
    ran = sft_process("run", "small_lora", "--json", home=tmp_path / "home", config=folder)
    check_failure(ran, tmp_path / "home", 2, str(tmp_path / "nowhere"))
    assert ran.json["status"] == "failed" and "nowhere" in ran.json["error"]


def test_an_unknown_snapshot(branch: Callable[..., Path], tmp_path: Path) -> None:
    check_failure(*run(branch(), tmp_path, "--snapshot", "2027-01-01"), 2, "2027-01-01", SNAPSHOT)


def test_names_of_snapshots_on_the_command_line(branch: Callable[..., Path], tmp_path: Path) -> None:
    """What is no name is refused; a folder of a name that cannot be used is told, and the others work."""
    folder = branch()
    for name in ("[/red]", "2027\x1b[31m", "[bold]x"):
        (folder / "rows" / name).mkdir(parents=True)
    for name in ("a/b", "..", "", "\x1b[31mred", "[/red]", "z" * 300):
        ran, home = run(folder, tmp_path, f"--snapshot={name}")
        check_failure(ran, home, 2, "no snapshot")
        assert "\x1b" not in ran.stderr and ran.stderr.count("sft:") == 1
    ran, home = run(folder, tmp_path, "--snapshot", SNAPSHOT, until="raw_rows")
    assert ran.code == 0 and "is left out" in ran.stderr and "\x1b" not in ran.stderr


def test_an_empty_snapshot(branch: Callable[..., Path], tmp_path: Path) -> None:
    check_failure(*run(branch(b""), tmp_path), 2, "no rows", str(tmp_path / "rows"))


def test_a_truncated_gzip(branch: Callable[..., Path], tmp_path: Path) -> None:
    check_failure(
        *run(branch(gzip.compress(LINES)[:-20], file="rows.jsonl.gz"), tmp_path), 2, "rows.jsonl.gz"
    )


def test_bad_lines_are_quarantined_and_too_many_block(branch: Callable[..., Path], tmp_path: Path) -> None:
    bad = (
        b"\xff\xfe broken\n"
        + b'{"thread_id": "X1", "prompt": "p", "completion": null}\n'
        + json.dumps({"thread_id": "X2", "prompt": "p", "completion": "x" * 5_000_000}).encode()
        + b"\n"
    )
    ran, home = run(branch(LINES + bad), tmp_path, until="validated_rows")
    assert ran.code == 0, ran.stderr[-3000:]
    counts = json.loads(Path(ran.json["artifacts"]["validated_rows"], "manifest.json").read_text())["counts"]
    assert (counts["accepted"], counts["quarantined"]) == (60, 3)
    ran, home = run(branch(LINES + bad * 10), tmp_path)
    check_failure(ran, home, 3, "reject_rate")
    assert ran.json["status"] == "blocked" and "reject_rate" in ran.json["error"]
    assert list(ran.json["artifacts"]) == ["raw_rows", "validated_rows"]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"training": {"learning_rte": 1}}, ("small_lora.yaml:", "learning_rate")),
        ({"model": {"base": "data/no_such_model"}}, ("no_such_model",)),
        ({"dataset": "smal"}, ("did you mean",)),
    ],
)
def test_a_bad_recipe(
    branch: Callable[..., Path], tmp_path: Path, recipe: dict, words: tuple[str, ...]
) -> None:
    check_failure(*run(branch(recipe=recipe), tmp_path), 2, *words)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """An SFT_HOME whose staging folder is a file system of 64 KiB."""
    home = tmp_path / "home"
    staging = home / "staging"
    staging.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(staging)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield home
    finally:
        subprocess.run(["umount", "-l", str(staging)], check=False)


def test_a_full_disk(branch: Callable[..., Path], tiny_disk: Path, tmp_path: Path) -> None:
    large = [
        {"thread_id": f"T{i}", "prompt": f"{i} " * 4000, "completion": random.Random(i).randbytes(4000).hex()}
        for i in range(100)
    ]
    ran, home = run(branch(large), tmp_path, until="raw_rows")
    assert home == tiny_disk
    check_failure(ran, home, 2, "no space left")
    assert not (home / "objects").exists()


def test_an_unknown_asset_and_a_wrong_option(branch: Callable[..., Path], tmp_path: Path) -> None:
    check_failure(*run(branch(), tmp_path, until="packed_shard"), 2, "packed_shards")
    check_failure(sft("run", "small_lora", "--jsn", home=tmp_path / "home"), tmp_path / "home", 2, "--jsn")


@pytest.mark.parametrize("skip", [False, True])
def test_a_grader_that_fits_no_row_blocks_before_training(
    branch: Callable[..., Path], tmp_path: Path, skip: bool
) -> None:
    grader = {"name": "fields", "kind": "json_fields", "fields": ["answer"]}
    recipe = {"evaluation": {"graders": [grader]}, "sanity": {"skip": skip}}
    ran, home = run(branch(recipe=recipe), tmp_path, until="sanity_check")
    if skip:
        assert ran.code == 0
    else:
        check_failure(ran, home, 3, "graders_run", "grader fields: no expected completion can be graded")

"""What is only a cache, or belongs to another artifact, stops nothing."""

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_pipeline.external_files import digest_file
from sft_pipeline.store.files import sha256_file


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(4096))


def truncated(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + bytes(100))


def other_table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE digests (something TEXT)")


def folder(path: Path) -> None:
    path.mkdir()


def locked(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("BEGIN EXCLUSIVE")
    HELD.append(database)


HELD: list[sqlite3.Connection] = []


@pytest.mark.parametrize("make", [garbage, truncated, other_table, folder, locked])
def test_a_cache_of_digests_that_cannot_be_used_is_done_without(
    home: Path, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    home.mkdir(exist_ok=True)
    make(home / "digests.db")
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    old = time.time() - 100
    os.utime(file, (old, old))
    try:
        assert digest_file(file) == sha256_file(file)
        file.write_text("{1}")
        assert digest_file(file) == sha256_file(file)
    finally:
        while HELD:
            HELD.pop().close()


def test_garbage_is_replaced_by_a_cache(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(exist_ok=True)
    garbage(home / "digests.db")
    monkeypatch.setattr("sft_pipeline.external_files.YOUNG_SECONDS", -1.0)
    file = tmp_path / os.fsdecode(b"caf\xe9.jsonl")  # not UTF-8
    file.write_text("{}")
    digest_file(file)
    digest_file(file)
    with sqlite3.connect(home / "digests.db") as database:
        assert database.execute("SELECT path, sha256 FROM digests").fetchall() == [
            (os.fsencode(file), sha256_file(file))
        ]

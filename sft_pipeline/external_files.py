"""Files read from outside the store: the names of a model's files, and digests, cached for large files."""

import contextlib
import fnmatch
import os
import sqlite3
import time
from pathlib import Path

from sft_pipeline.errors import InputError
from sft_pipeline.hub import parse_hub_id, without_revision
from sft_pipeline.project import project_path, sft_home
from sft_pipeline.store.files import sha256_file

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
"""The files of a model folder that decide what the model computes."""

ID_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Those files of a tokenizer folder that decide the ids."""

TOKENIZER_FILES = (*ID_FILES, "generation_config.json", "chat_template.jinja", "chat_template.json")
"""Everything that is read of a tokenizer folder."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of a PEFT adapter's folder."""

HUB_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
"""What is fetched of a model on the hub: weights as safetensors, configuration, tokenizer; no pickles."""

# A file changed again within the clock's resolution would keep its times: too young to be cached.
YOUNG_SECONDS = 2.0


def digest_file(path: Path) -> str:
    """SHA-256 of a file, from the cache where its path, size, inode and times are unchanged.

    Of the two times, an editor can put back that of the modification, but not that of the change.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        status = path.stat()
        key = (os.fsencode(path), *file_state(status))
        if digest := _cached(key):
            return digest
        digest = sha256_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if time.time() - max(status.st_mtime, status.st_ctime) > YOUNG_SECONDS:
        _keep(key, digest)
    return digest


def file_state(status: os.stat_result) -> tuple[int, int, int, int]:
    """What differs after a file was written to or replaced: size, times of modification and change, inode."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


_Key = tuple[bytes, int, int, int, int]
"""path, size, times of modification and change, inode"""


def _cached(key: _Key) -> str | None:
    """A digest from the cache. One that cannot be read costs time, and stops nothing."""
    with contextlib.suppress(sqlite3.Error, OSError), contextlib.closing(_open_cache()) as cache:
        query = "SELECT sha256 FROM digests WHERE path=? AND size=? AND mtime=? AND ctime=? AND inode=?"
        if row := cache.execute(query, key).fetchone():
            return str(row[0])
    return None


def _keep(key: _Key, digest: str) -> None:
    path = sft_home() / "digests.db"
    try:
        with contextlib.closing(_open_cache()) as cache, cache:
            cache.execute("INSERT OR REPLACE INTO digests VALUES (?,?,?,?,?,?)", (*key, digest))
    except sqlite3.DatabaseError as error:
        if not isinstance(error, sqlite3.OperationalError):  # it is no database: a fresh one is begun
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    except OSError:
        pass  # it is only a cache


def _open_cache() -> sqlite3.Connection:
    home = sft_home()
    home.mkdir(parents=True, exist_ok=True)
    cache = sqlite3.connect(home / "digests.db", timeout=2)  # shorter than hashing a model again
    cache.execute(
        "CREATE TABLE IF NOT EXISTS digests "
        "(path BLOB PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, sha256 TEXT)"
    )
    return cache


def digest_model(base: str, tokenizer: str) -> dict[str, str]:
    """The digests of what is read of a base model and of its tokenizer, as `digest_files` gives them.

    Args:
        base, tokenizer: Folders or hub ids.
    """
    tokenizer = without_revision(tokenizer)
    return digest_files(base, MODEL_FILES) | digest_files(tokenizer, TOKENIZER_FILES)


def digest_files(path_or_id: str, patterns: tuple[str, ...] = ("*",)) -> dict[str, str]:
    """The digest of a local file, or of each file of a local folder whose name matches.

    A hub id has no local files to hash; its pinned revision, which is part of the configuration, stands for
    them.

    Returns:
        {the file's path in the terms of `path_or_id`: sha256}; {"hub:<id>": "hub:<id>"} for a hub id.

    Raises:
        InputError: A local path does not exist, or no file of the folder matches.
    """
    path = project_path(path_or_id)
    if path.is_file():
        return {path_or_id: digest_file(path)}
    if path.is_dir():
        names = sorted(
            p.name
            for p in path.iterdir()
            if p.is_file() and any(fnmatch.fnmatch(p.name, x) for x in patterns)
        )
        if not names:
            raise InputError(f"{path}: no file named like {', '.join(patterns)} in this folder")
        return {f"{path_or_id.rstrip('/')}/{name}": digest_file(path / name) for name in names}
    if parse_hub_id(path_or_id):
        return {f"hub:{path_or_id}": f"hub:{path_or_id}"}
    raise InputError(
        f"{path} does not exist (given as {path_or_id!r}; relative paths start at the folder of dagster.yaml)"
    )

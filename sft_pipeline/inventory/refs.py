"""The refs of the store as they lie on the disk, readable or not."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sft_pipeline.store import Store

RUNS = ".runs"


@dataclass(frozen=True)
class StoredRef:
    """One ref.

    Attributes:
        asset, partition: As its place says.
        fingerprint: Of the artifact it names; None where it cannot be read.
        data_version: As it was when the ref was written.
        run_id: Of the run that it belongs to; None for the current artifact of an asset.
    """

    path: Path
    asset: str
    partition: str
    fingerprint: str | None
    data_version: str | None
    run_id: str | None = None


def current_refs(store: Store) -> list[StoredRef]:
    """One for each asset and snapshot that has a current artifact."""
    return [
        _read(path, store.refs, None)
        for path in _files(store.refs)
        if path.relative_to(store.refs).parts[0] != RUNS
    ]


def run_ids(store: Store) -> list[str]:
    """The runs that have refs."""
    folder = store.refs / RUNS
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def run_refs(store: Store, run_id: str) -> list[StoredRef]:
    """What one run made."""
    base = store.refs / RUNS / run_id
    return [_read(path, base, run_id) for path in _files(base)]


def _files(folder: Path) -> Iterator[Path]:
    """The refs below a folder; names that begin with a dot are of files that are being written."""
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else ():
        if not path.name.startswith("."):
            yield path


def _read(path: Path, base: Path, run_id: str | None) -> StoredRef:
    asset, partition = path.relative_to(base).parent.as_posix(), path.stem
    try:
        value = json.loads(path.read_bytes())
        return StoredRef(
            path, asset, partition, str(value["fingerprint"]), str(value["data_version"]), run_id
        )
    except (OSError, ValueError, LookupError, TypeError):
        return StoredRef(path, asset, partition, None, None, run_id)

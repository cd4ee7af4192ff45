"""Removes what nothing needs any more.

Decided and taken out of the store while no process can begin to use another artifact (`store/uses.py`): one
rename each, consumers before what they were made from. Deleted afterwards. A process that dies in between
leaves whole artifacts and a trash folder, which the next `sft gc` or `sft run` empties.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError, SftError
from sft_pipeline.inventory.needed import KeepRule, find_needed, made_from
from sft_pipeline.inventory.refs import RUNS
from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import clear_disk_errors, locked, remove_tree
from sft_pipeline.store.uses import collecting

WAIT_SECONDS = 60.0  # for processes that look for their inputs
CHECKPOINTS = "checkpoint-*"
NOTES = ("registered", "untracked")  # folders with a note for each artifact, void without it


@dataclass(frozen=True)
class RemovedFolder:
    """One folder that is removed.

    Attributes:
        kind: "work" or "artifact".
        asset, partition: Null for work whose artifact is not there.
        bytes: What its removal frees, after those before it in the list: a checkpoint is one file of the disk
            with a name in work/ and one in the artifact.
    """

    kind: str
    path: Path
    fingerprint: str
    asset: str | None
    partition: str | None
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path)}


@dataclass
class Collection:
    """What is removed, and what is kept.

    Attributes:
        kept: {reason: number of artifacts}.
        unfinished: Work folders of trainings that can go on: (path, bytes).
    """

    removed: list[RemovedFolder] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)
    unfinished: list[tuple[Path, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dead_runs: list[str] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(folder.bytes for folder in self.removed)

    def to_json(self) -> dict[str, Any]:
        return {
            "removed": [folder.to_json() for folder in self.removed],
            "bytes": self.bytes,
            "kept": self.kept,
            "unfinished": [{"path": str(path), "bytes": size} for path, size in self.unfinished],
            "swept": self.swept,
            "notes": self.notes,
        }


def collect(
    store: Store,
    rule: KeepRule,
    *,
    dry_run: bool,
    report: Reporter,
    planned: Callable[[Collection], None] = lambda collection: None,
) -> Collection:
    """Removes what nothing needs.

    Args:
        dry_run: Only decide.
        planned: Called with what will be removed, before anything is.

    Returns:
        What was removed, or would be.

    Raises:
        SftError: Something needed cannot be read, or other processes do not let go of the store.
    """
    swept = [] if dry_run else store.sweep()
    trash: list[tuple[Path, int]] = []
    try:
        with collecting(store.locks, wait_seconds=WAIT_SECONDS) as used:
            collection = _decide(store, rule, used)
            collection.swept = swept
            planned(collection)
            if dry_run:
                return collection
            with clear_disk_errors("collecting"):
                trash = list(_take_out(store, collection))
    except TimeoutError:
        raise SftError(
            f"other processes keep looking for artifacts in {store.home}: nothing was removed. Run it later"
        ) from None
    total = sum(size for _, size in trash)
    done = 0
    for path, size in trash:
        remove_tree(path)
        report.progress("deleting", done := done + size, total, "bytes")
    return collection


def _decide(store: Store, rule: KeepRule, used: tuple[set[str], set[str]]) -> Collection:
    unreadable: list[str] = []
    artifacts = {a.path.name: a for a in store.all(lambda error: unreadable.append(str(error)))}
    builds = _builds(store)
    if strangers := sorted(builds - used[0]):
        note = (
            f"{len(strangers)} builds go on that do not say what they read, the first of them "
            f"{strangers[0][:12]}: nothing is removed. Run again when they are done"
        )
        return Collection(kept={"a build goes on": len(artifacts)}, notes=[note])
    needed = find_needed(store, artifacts, rule, used)
    collection = Collection(notes=needed.notes, dead_runs=needed.dead_runs)
    if unreadable:
        collection.notes.append(
            f"{len(unreadable)} artifacts have a manifest that cannot be read and are left alone; "
            f"`sft fsck` names them. The first: {unreadable[0]}"
        )
    for why in needed.why.values():
        collection.kept[why] = collection.kept.get(why, 0) + 1
    freed = _FreedBytes()
    for path in sorted((store.home / "work").glob("*")):
        if path.name in builds | used[0] or not path.is_dir():
            continue
        if _is_unfinished(path, store, rule):
            collection.unfinished.append((path, _size(path)))
        else:
            about = artifacts.get(path.name)
            collection.removed.append(_removed("work", path, about, freed.add(path)))
    unneeded = {f: a for f, a in artifacts.items() if f not in needed.why}
    for artifact in _consumers_first(unneeded, Path(os.path.realpath(store.objects))):
        collection.removed.append(_removed("artifact", artifact.path, artifact, freed.add(artifact.path)))
    return collection


def _removed(kind: str, path: Path, artifact: Artifact | None, size: int) -> RemovedFolder:
    manifest = artifact.manifest if artifact else None
    return RemovedFolder(
        kind,
        path,
        path.name,
        manifest.asset if manifest else None,
        manifest.partition if manifest else None,
        size,
    )


def _builds(store: Store) -> set[str]:
    """The fingerprints that are being built: their locks are held."""
    found = set()
    for path in store.locks.glob("*.lock"):
        if path.name == "collect.lock":
            continue
        try:
            with locked(path, wait_seconds=0):
                pass
        except TimeoutError:
            found.add(path.stem)
    return found


def _is_unfinished(work: Path, store: Store, rule: KeepRule) -> bool:
    """Whether a training can go on from a work folder; what is older than asked for is given up.

    A folder whose artifact is there is finished. One without a checkpoint holds nothing to go on from.
    """
    if store.get(work.name) is not None:
        return False
    checkpoints = list(work.glob(CHECKPOINTS))
    if not checkpoints:
        return False
    newest = max(path.stat().st_mtime for path in checkpoints)
    return not rule.younger_than_days or time.time() - newest < rule.younger_than_days * 86_400


def _consumers_first(artifacts: Mapping[str, Artifact], objects: Path) -> list[Artifact]:
    """Each before what it was made from."""
    order: list[Artifact] = []
    done: set[str] = set()

    def visit(fingerprint: str) -> None:
        if fingerprint in done or fingerprint not in artifacts:
            return
        done.add(fingerprint)
        for needed in sorted(made_from(artifacts[fingerprint].manifest, objects)):
            visit(needed)
        order.append(artifacts[fingerprint])

    for fingerprint in artifacts:
        visit(fingerprint)
    return order[::-1]


def _take_out(store: Store, collection: Collection) -> Iterator[tuple[Path, int]]:
    """Takes the folders out of the store: (where each lies now, its bytes)."""
    for run_id in collection.dead_runs:
        remove_tree(store.refs / RUNS / run_id)
    left: list[RemovedFolder] = []
    for folder in collection.removed:
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(locked(store.locks / f"{folder.fingerprint}.lock", wait_seconds=0))
                if folder.kind == "work" and (folder.path / ".lock").exists():  # of the training's child
                    stack.enter_context(locked(folder.path / ".lock", wait_seconds=0))
                place = store.discard(folder.path)
        except (TimeoutError, FileNotFoundError):
            left.append(folder)
            continue
        if folder.kind == "artifact":
            for name in NOTES:
                (store.home / name / f"{folder.fingerprint}.json").unlink(missing_ok=True)
        yield place, folder.bytes
    if left:
        collection.removed = [folder for folder in collection.removed if folder not in left]
        collection.notes.append(f"{len(left)} folders are in use and were left")


class _FreedBytes:
    """What is freed when folders are removed one after the other: a file counts with its last name."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], int] = {}

    def add(self, folder: Path) -> int:
        freed = 0
        for status in _files(folder):
            key = (status.st_dev, status.st_ino)
            self._names[key] = self._names.get(key, 0) + 1
            if self._names[key] == status.st_nlink:
                freed += status.st_size
        return freed


def _files(folder: Path) -> Iterator[os.stat_result]:
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield os.lstat(os.path.join(root, name))


def _size(folder: Path) -> int:
    return sum(status.st_size for status in _files(folder))


def find_artifact(prefix: str, store: Store) -> Artifact:
    """The artifact of the store whose fingerprint begins so.

    Raises:
        InputError: There is none, or more than one.
    """
    found = [a for a in store.all() if a.path.name.startswith(prefix)] if prefix else []
    if len(found) != 1:
        raise InputError(
            f"{prefix}: {len(found)} artifacts of the store begin like that. `sft list artifacts`"
        )
    return found[0]

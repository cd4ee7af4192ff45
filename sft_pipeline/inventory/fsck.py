"""Hashes the whole store again, and looks for refs that point nowhere and for what killed processes left."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.inventory.pins import pinned
from sft_pipeline.inventory.refs import StoredRef, current_refs, run_ids, run_refs
from sft_pipeline.lineage.consistency import count_problems, manifest_problems
from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import locked, sha256_file
from sft_pipeline.store.manifest import MANIFEST_NAME

REBUILD = "delete the folder {path} and run `sft run` again: it is made again from what it was made from"


@dataclass(frozen=True)
class StoreDamage:
    """One thing that is not as it was written.

    Attributes:
        kind: "file", "manifest", "artifact" or "ref".
        used_by: Exports that were made from the damaged one.
    """

    kind: str
    path: str
    problem: str
    remedy: str
    asset: str | None = None
    partition: str | None = None
    fingerprint: str | None = None
    used_by: tuple[str, ...] = ()


@dataclass
class StoreCheck:
    """The outcome.

    Attributes:
        abandoned: Folders that killed processes left: harmless, and swept by the next `sft run` or `sft gc`.
        notes: What is incomplete without being damaged.
    """

    damaged: list[StoreDamage] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    artifacts: int = 0
    files: int = 0
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(store: Store, report: Reporter) -> StoreCheck:
    """Looks at everything in objects/, refs/, staging/ and trash/; changes nothing."""
    found = StoreCheck()
    folders = [p for p in sorted(store.objects.glob("*")) if not p.name.startswith(".")]
    total, readable = 0, {}
    for folder in folders:
        artifact = Artifact(folder)
        try:
            total += sum(f.bytes for f in artifact.manifest.files)
            readable[folder.name] = artifact
        except InputError as error:
            if folder.exists():
                _unreadable(folder, str(error), found)
    for fingerprint, artifact in readable.items():
        _check_artifact(artifact, found, report, total)
        if fingerprint != artifact.manifest.fingerprint:
            _add(found, artifact, "artifact", artifact.path, f"holds {artifact.manifest.fingerprint[:12]}")
    found.artifacts = len(folders)
    _name_users(found, readable)
    _check_refs(store, readable, found)
    _check_completeness(store, readable, found)
    found.abandoned = [str(path) for path in _abandoned(store)]
    report.progress("hashing", total, total, "bytes")
    return found


def _unreadable(folder: Path, error: str, found: StoreCheck) -> None:
    remedy = REBUILD.format(path=folder)
    if not folder.is_dir():
        found.damaged.append(StoreDamage("artifact", str(folder), "no folder", f"remove {folder}"))
    elif not (folder / MANIFEST_NAME).is_file():
        found.damaged.append(
            StoreDamage("manifest", str(folder / MANIFEST_NAME), "missing", remedy, fingerprint=folder.name)
        )
    else:
        problem = error.removeprefix(f"{folder / MANIFEST_NAME}: ").partition(". ")[0]
        found.damaged.append(
            StoreDamage("manifest", str(folder / MANIFEST_NAME), problem, remedy, fingerprint=folder.name)
        )


def _check_artifact(artifact: Artifact, found: StoreCheck, report: Reporter, total: int) -> None:
    manifest, known = artifact.manifest, {MANIFEST_NAME}
    try:
        written = json.loads((artifact.path / MANIFEST_NAME).read_bytes())
        sealed = manifest.to_json()["manifest_sha256"] == written.get("manifest_sha256")
    except (OSError, ValueError) as error:
        _add(found, artifact, "manifest", artifact.path / MANIFEST_NAME, f"cannot be read ({error})")
        return
    problems = [] if sealed else ["was changed after it was written: its own SHA-256 differs"]
    problems += manifest_problems(manifest, written) if sealed else []
    before = len(found.damaged)
    for entry in manifest.files:
        known.add(entry.path)
        path = artifact.path / entry.path
        try:
            size, digest = path.stat().st_size, sha256_file(path)
        except (FileNotFoundError, NotADirectoryError):
            _add(found, artifact, "file", path, "missing")
            continue
        except OSError as error:
            _add(found, artifact, "file", path, f"cannot be read ({error.strerror})")
            continue
        found.files, found.bytes = found.files + 1, found.bytes + size
        report.progress("hashing", found.bytes, total, "bytes")
        if size != entry.bytes:
            _add(found, artifact, "file", path, f"{size:,} bytes, the manifest says {entry.bytes:,}")
        elif digest != entry.sha256:
            _add(found, artifact, "file", path, "its SHA-256 differs from the manifest's")
    if len(found.damaged) == before:  # else the counts of a damaged file follow from the damage
        problems += count_problems(manifest, artifact.path)
    for problem in problems:
        _add(found, artifact, "manifest", artifact.path / MANIFEST_NAME, problem)
    for path in sorted(artifact.path.rglob("*")):
        if os.path.isfile(path) and path.relative_to(artifact.path).as_posix() not in known:
            _add(found, artifact, "file", path, "the manifest does not list it", f"remove {path}")


def _add(
    found: StoreCheck, artifact: Artifact, kind: str, path: Path, problem: str, remedy: str | None = None
) -> None:
    if not artifact.path.exists():
        return  # collected meanwhile
    m = artifact.manifest
    found.damaged.append(
        StoreDamage(
            kind,
            str(path),
            problem,
            remedy or REBUILD.format(path=artifact.path),
            m.asset,
            m.partition,
            m.fingerprint,
        )
    )


def _name_users(found: StoreCheck, readable: dict[str, Artifact]) -> None:
    """Says of each damaged artifact which exports were made from it."""
    users: dict[str, list[str]] = {}
    for artifact in readable.values():
        m = artifact.manifest
        if not m.asset.endswith("/exported_model"):
            continue
        todo, seen = [m.fingerprint], set()
        while todo:
            fingerprint = todo.pop()
            if fingerprint not in seen:
                seen.add(fingerprint)
                users.setdefault(fingerprint, []).append(f"{m.asset} {m.partition} ({m.fingerprint[:12]})")
                if upstream := readable.get(fingerprint):
                    todo += [entry.fingerprint for entry in upstream.manifest.inputs.values()]
    found.damaged = [
        StoreDamage(**{**d.__dict__, "used_by": tuple(users.get(d.fingerprint or "", ()))})
        for d in found.damaged
    ]


def _check_refs(store: Store, readable: dict[str, Artifact], found: StoreCheck) -> None:
    for ref in current_refs(store):
        if problem := _ref_problem(ref, store, readable):
            recipe = ref.asset.rpartition("/")[0]
            found.damaged.append(
                StoreDamage(
                    "ref",
                    str(ref.path),
                    problem,
                    f"materialize it again (sft run, or {recipe} in `sft ui`), or delete the file",
                    ref.asset,
                    ref.partition,
                    ref.fingerprint,
                )
            )
    gone = sum(
        store.get(ref.fingerprint) is None
        for run_id in run_ids(store)
        for ref in run_refs(store, run_id)
        if ref.fingerprint
    )
    if gone:
        found.notes.append(
            f"{gone} refs of ended runs name artifacts that are not in the store any more: executing such a "
            "run again from its middle asks for its beginning"
        )
    for fingerprint in pinned(store):
        if store.get(fingerprint) is None:
            found.notes.append(
                f"the pin {fingerprint[:12]} names nothing in the store: sft gc --unpin {fingerprint[:12]}"
            )


def _ref_problem(ref: StoredRef, store: Store, readable: dict[str, Artifact]) -> str | None:
    if ref.fingerprint is None:
        return "cannot be read"
    artifact = readable.get(ref.fingerprint)
    if artifact is None:
        if (store.objects / ref.fingerprint).is_dir():
            return None  # its manifest is damaged, and named already
        return f"points nowhere: {ref.fingerprint[:12]} is not in the store"
    m = artifact.manifest
    for name, recorded, own in (
        ("asset", ref.asset, m.asset),
        ("snapshot", ref.partition, m.partition),
        ("data version", ref.data_version, m.data_version),
    ):
        if recorded != own:
            return f"its {name} is {recorded}, that of {ref.fingerprint[:12]} is {own}"
    return None


def _check_completeness(store: Store, readable: dict[str, Artifact], found: StoreCheck) -> None:
    """Exports of which something upstream is not at hand: they work, but not all can be verified."""
    for artifact in readable.values():
        missing = sorted(
            entry.asset for entry in artifact.manifest.inputs.values() if store.get(entry.fingerprint) is None
        )
        if missing and artifact.manifest.asset.endswith("/exported_model"):
            m = artifact.manifest
            found.notes.append(
                f"{m.asset} {m.partition} ({m.fingerprint[:12]}) was made from {', '.join(missing)}, not in "
                "the store; its lineage/ has the manifests"
            )


def _abandoned(store: Store) -> list[Path]:
    """Staging folders whose builder is gone, and what was not deleted to the end."""
    found = sorted(store.trash.glob("*"))
    for folder in sorted(store.staging.glob("*")):
        lock = store.locks / f"{folder.name.partition('.')[0]}.lock"
        try:
            with locked(lock, wait_seconds=0):
                if folder.exists():
                    found.append(folder)
        except TimeoutError:
            continue
    return found

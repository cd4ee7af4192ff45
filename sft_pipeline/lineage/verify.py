"""Hashes all that can be reached of a model's chain again, and checks that the manifests fit each other."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.lineage.consistency import count_problems, entry_problems, has_all_parts, manifest_problems
from sft_pipeline.lineage.copies import copy_problems
from sft_pipeline.lineage.walk import Chain, Node, artifact_root, walk
from sft_pipeline.project import project_path
from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Store
from sft_pipeline.store.files import sha256_file, sha256_json
from sft_pipeline.store.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Finding:
    """Something that does not fit: the file it is about, and what is wrong."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True)
class Verification:
    """The outcome.

    Attributes:
        verified: Nothing that could be reached differs from what was recorded.
        findings: What differs.
        unreachable: What was recorded but could not be looked at; it is neither verified nor refuted.
        files: Files that were hashed.
        bytes: Their size.
    """

    verified: bool
    findings: tuple[Finding, ...]
    unreachable: tuple[str, ...]
    files: int
    bytes: int
    chain: Chain | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "verified": self.verified,
            "findings": [{"file": f.file, "problem": f.problem} for f in self.findings],
            "unreachable": list(self.unreachable),
            "files": self.files,
            "bytes": self.bytes,
        }


@dataclass
class _Work:
    report: Reporter
    findings: list[Finding] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    hashed: dict[Path, str] = field(default_factory=dict)
    bytes: int = 0
    total: int = 0

    def wrong(self, file: Path | str, problem: str) -> None:
        self.findings.append(Finding(str(file), problem))

    def sha256(self, path: Path) -> str:
        """Raises:
        OSError: The file is not there or cannot be read.
        """
        if path not in self.hashed:
            self.hashed[path] = sha256_file(path)
            self.bytes += path.stat().st_size
            self.report.progress("verifying", self.bytes, max(self.total, self.bytes), "bytes")
        return self.hashed[path]


def verify(folder: Path, store: Store | None = None, report: Reporter | None = None) -> Verification:
    """Verifies an exported model (or any artifact) and all that it was made from.

    Hashed are the artifact's own files, every upstream artifact that lies in the store, the source files, and
    the base model's and tokenizer's files at the places that the manifests record. An export that was moved
    elsewhere is verified with the manifests in its `lineage/` folder.

    Args:
        folder: The artifact, or a folder inside it.
        store: Where upstream artifacts lie; `$SFT_HOME` by default.

    Raises:
        InputError: `folder` is no artifact.
    """
    store = store or Store()
    work = _Work(report or Reporter())
    root = artifact_root(folder)
    try:
        chain = walk(root, store)
    except InputError as error:
        file = str(root / MANIFEST_NAME)
        return Verification(False, (Finding(file, str(error).removeprefix(f"{file}: ")),), (), 0, 0)
    work.total = sum(f.bytes for n in chain.nodes if n.path and n.manifest for f in n.manifest.files)
    by_fingerprint = {n.fingerprint: n for n in chain.nodes}
    _verify_root(chain.nodes[0], store, work)
    for node in chain.nodes:
        _verify_node(node, work)
        _verify_inputs(node, by_fingerprint, store, work)
    damaged = {finding.file for finding in work.findings}
    for path, problem in copy_problems(chain):
        if str(path) not in damaged:
            work.wrong(path, problem)
    _verify_outside(chain, store, work)
    findings = tuple(dict.fromkeys(work.findings))
    return Verification(
        not findings, findings, tuple(dict.fromkeys(work.unreachable)), len(work.hashed), work.bytes, chain
    )


def _verify_root(root: Node, store: Store, work: _Work) -> None:
    """What no consumer has recorded: the artifact itself, compared with the store's own record of it."""
    kept, own = store.get(root.fingerprint), root.manifest_path
    if kept is not None and own is not None and kept.path != root.path:
        record = kept.path / MANIFEST_NAME
        if record.read_bytes() != own.read_bytes():
            work.wrong(
                own,
                f"differs from the store's manifest of the same artifact, {record}: one of them was changed, "
                "or it was deleted and built again after this copy was taken",
            )
        return
    version = store.recorded_version(root.manifest) if root.manifest else None
    if version is None:
        work.unreachable.append(
            f"{_name(root)}: the store has no record of it, so that its manifest was compared with its own "
            "files and what it was made from only; the model's version in MLflow has its data version too "
            "(sft.data_version)"
        )
    elif root.manifest is not None and version != root.manifest.data_version:
        work.wrong(own or root.asset, f"the store's ref records the data version {version[:12]} of it")


# -- one artifact ----------------------------------------------------------------------------------


def _verify_node(node: Node, work: _Work) -> None:
    if node.problem:
        work.wrong(node.problem.split(": ", 1)[0], "the manifest cannot be read")
    if node.manifest is None or node.manifest_path is None:
        if not node.problem:
            work.unreachable.append(
                f"{_name(node)}: no readable manifest of it in the store or in the export's lineage"
            )
        return
    if node.manifest.fingerprint != node.fingerprint or node.manifest.asset != node.asset:
        work.wrong(
            node.manifest_path,
            f"it is the manifest of {node.manifest.asset} ({node.manifest.fingerprint[:12]}), "
            f"not of {node.asset} ({node.fingerprint[:12]})",
        )
    written = json.loads(node.manifest_path.read_bytes())
    for problem in manifest_problems(node.manifest, written):
        work.wrong(node.manifest_path, problem)
    if "identity" not in node.manifest.model_fields_set:
        work.unreachable.append(
            f"{_name(node)}: made by an earlier version, which did not record all parts of the fingerprint; "
            "it was not computed again"
        )
    elif not has_all_parts(node.manifest, written) and node.path is None:
        work.unreachable.append(
            f"{_name(node)}: the copy of its manifest leaves out folders of the machine it was made on; its "
            "fingerprint was not computed again"
        )
    if node.path is None:
        work.unreachable.append(
            f"{_name(node)}: its files are not in the store; only its manifest was checked"
        )
        return
    _verify_seal(node.manifest_path, work)
    known = {MANIFEST_NAME}
    for entry in node.manifest.files:
        path = node.path / entry.path
        known.add(entry.path)
        try:
            digest, size = work.sha256(path), path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            work.wrong(path, "missing")
            continue
        except OSError as error:
            work.wrong(path, f"it cannot be read ({error.strerror})")
            continue
        if digest != entry.sha256:
            work.wrong(path, f"its SHA-256 differs from the one in the manifest of {node.asset}")
        elif size != entry.bytes:
            work.wrong(
                node.manifest_path, f"it gives {entry.path} {entry.bytes:,} bytes, the file has {size:,}"
            )
    for problem in count_problems(node.manifest, node.path):
        work.wrong(node.manifest_path, problem)
    for path in sorted(node.path.rglob("*")):
        if os.path.isfile(path) and path.relative_to(node.path).as_posix() not in known:
            work.wrong(path, f"not a file of {node.asset}: the manifest does not list it")


def _name(node: Node) -> str:
    return f"{node.asset} {node.partition} ({node.fingerprint[:12]})"


def _verify_seal(path: Path, work: _Work) -> None:
    """The manifest is byte for byte what it was when it was written."""
    written = path.read_bytes()
    data = json.loads(written)
    seal = data.pop("manifest_sha256", None)
    if seal != sha256_json(data):
        work.wrong(path, "the manifest was changed: it is not what its own SHA-256 (manifest_sha256) says")
    elif (
        json.dumps({**data, "manifest_sha256": seal}, indent=2, ensure_ascii=False) + "\n"
    ).encode() != written:
        work.wrong(path, "the manifest was changed: it is not laid out as it was written")


def _verify_inputs(node: Node, by_fingerprint: dict[str, Node], store: Store, work: _Work) -> None:
    """What a consumer recorded of its inputs is what the inputs say of themselves."""
    if node.manifest is None:
        return
    for name, entry in node.manifest.inputs.items():
        upstream = by_fingerprint.get(entry.fingerprint)
        if upstream is not None and upstream.manifest is not None:
            for problem in entry_problems(node.manifest, name, entry, upstream.manifest):
                work.wrong(upstream.manifest_path or upstream.asset, problem)
    for entry in node.manifest.reused_from:
        # Rows that were taken over are in the artifact itself: the earlier one may be gone.
        if (earlier := store.get(entry.fingerprint)) is None:
            continue
        try:
            problems = list(entry_problems(node.manifest, "rows of an earlier one", entry, earlier.manifest))
        except InputError as error:
            work.unreachable.append(f"{node.asset} took rows over from one that cannot be read: {error}")
            continue
        for problem in problems:  # no fingerprint covers this record
            work.wrong(node.manifest_path or node.asset, problem)


# -- what lies outside the store -------------------------------------------------------------------


def _verify_outside(chain: Chain, store: Store, work: _Work) -> None:
    """Sources, base model, tokenizer, schemas and graders, where they are still at their recorded places.

    Relative names start at the project that made the model. Where nothing of it lies in the store, this may
    be another project, with files of the same names.
    What only had to accept, such as a sanity check, may have read a grader that was changed afterwards: the
    evaluation records the one that judged the model.
    """
    of_this_project = any(node.path and node.path.parent == store.objects for node in chain.nodes)
    recorded: dict[str, dict[str, str]] = {}  # {name: {digest: the artifact that recorded it}}
    for node in chain.nodes:
        if node.manifest is None:
            continue
        for name, digest in node.manifest.outside.items():
            what = f"{name} (read by {node.asset})"
            if digest.startswith("hub:"):
                work.unreachable.append(f"{what}: on the hub at a pinned revision")
            elif node.role == "acceptance":
                _verify_accepted(name, digest, what, work)
            else:
                recorded.setdefault(name, {}).setdefault(digest, node.asset)
    for name, digests in recorded.items():
        path, (by, *others) = project_path(name), digests.values()
        what = f"{name} (read by {by})"
        if others and not name.startswith("…/"):  # of which a copy has left out the folder
            said = ", ".join(f"{digest[:12]} by {asset}" for digest, asset in digests.items())
            work.wrong(name, f"its SHA-256 is recorded as {said}")
        try:
            found = work.sha256(path)
        except (FileNotFoundError, NotADirectoryError):
            work.unreachable.append(f"{what}: not at its recorded place {path}")
            continue
        except OSError as error:
            work.unreachable.append(f"{what}: {path} cannot be read ({error.strerror})")
            continue
        if found in digests:
            continue
        if of_this_project or Path(name).is_absolute():
            work.wrong(path, f"its SHA-256 differs from the one that {by} recorded")
        else:
            work.unreachable.append(f"{what}: another file is at this place, {path}")


def _verify_accepted(name: str, digest: str, what: str, work: _Work) -> None:
    """What only had to accept may have read a file that was changed afterwards."""
    try:
        if work.sha256(project_path(name)) != digest:
            work.unreachable.append(f"{what}: changed since it accepted")
    except OSError:
        work.unreachable.append(f"{what}: not at its recorded place")

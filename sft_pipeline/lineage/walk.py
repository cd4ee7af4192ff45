"""The chain of manifests behind an artifact, newest first, ending at the source files.

export/manifest.json ── inputs ─▶ objects/<fingerprint>/manifest.json ── inputs ─▶ ... ─▶ raw_rows ─▶ source
files
                  └── lineage/ ─▶ copies of the same manifests, for a model that left its store
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact, InputEntry, Manifest, Store
from sft_pipeline.store.files import sha256_json
from sft_pipeline.store.manifest import MANIFEST_NAME

LINEAGE_FOLDER = "lineage"


@dataclass(frozen=True)
class Node:
    """One artifact of the chain.

    Attributes:
        config: SHA-256 of the configuration it was made with.
        path: Its folder where it is at hand, None where only its manifest is.
        manifest_path: The manifest that was read.
        manifest: What it says; None where no manifest was found (then only what its consumer recorded is
            known).
        problem: Why the manifest in the store could not be read.
    """

    asset: str
    partition: str
    fingerprint: str
    data_version: str
    role: str
    path: Path | None = None
    manifest_path: Path | None = None
    manifest: Manifest | None = None
    problem: str | None = None

    @property
    def stage(self) -> str:
        return self.asset.rpartition("/")[2]

    @property
    def config(self) -> str | None:
        return sha256_json(self.manifest.config) if self.manifest else None

    def to_json(self) -> dict[str, Any]:
        """Plain values; paths as strings."""
        m = self.manifest
        return {
            "asset": self.asset,
            "partition": self.partition,
            "fingerprint": self.fingerprint,
            "data_version": self.data_version,
            "role": self.role,
            "path": str(self.path) if self.path else None,
            "code_version": m.code_version if m else None,
            "config_sha256": self.config,
            "created_at": m.created_at if m else None,
            "dagster_run_id": m.dagster_run_id if m else None,
            "mlflow_run_id": m.mlflow_run_id if m else None,
            "accepted": m.accepted if m else None,
            "counts": dict(m.counts) if m else {},
            "files": len(m.files) if m else None,
            "inputs": {name: entry.fingerprint for name, entry in m.inputs.items()} if m else {},
            "outside": dict(m.outside) if m else {},
        }


@dataclass(frozen=True)
class Chain:
    """The artifact at `root` and everything it was made from.

    Attributes:
        nodes: The root's node first, every node before what it was made from.
    """

    root: Path
    nodes: tuple[Node, ...]

    def by_stage(self, name: str) -> list[Node]:
        return [n for n in self.nodes if n.stage == name]

    def sources(self) -> dict[str, str]:
        """{source file: sha256} as the raw rows recorded them."""
        return {
            name: digest
            for n in self.by_stage("raw_rows")
            if n.manifest
            for name, digest in n.manifest.outside.items()
        }

    def to_json(self) -> list[dict[str, Any]]:
        return [n.to_json() for n in self.nodes]


def artifact_root(folder: Path) -> Path:
    """The artifact's folder from itself or from a folder inside it (such as `merged`).

    Raises:
        InputError: No manifest.json there.
    """
    folder = Path(os.path.realpath(os.path.expanduser(folder)))
    for candidate in (folder, *list(folder.parents)[:2]):
        if os.path.lexists(candidate / MANIFEST_NAME):
            return candidate
    raise InputError(
        f"{folder}: no {MANIFEST_NAME} here, so this is no artifact. Give the folder of an exported model"
    )


def copied_manifests(root: Path) -> dict[str, Path]:
    """{fingerprint: file} of the manifests that an export carries in `lineage/`."""
    found = {}
    for path in sorted((root / LINEAGE_FOLDER).glob("*.json")):
        try:
            found[Manifest.read(path).fingerprint] = path
        except InputError:
            continue  # verification names a damaged copy by its hash; the chain is read from the rest
    return found


def walk(folder: Path, store: Store | None = None) -> Chain:
    """The chain behind an artifact.

    Manifests are taken from the objects beside the artifact, then from the store, then from the export's own
    copies.

    Args:
        folder: An exported model, any artifact, or a folder inside one.
        store: Where else upstream artifacts may lie; `$SFT_HOME` by default.

    Raises:
        InputError: `folder` is no artifact, or a manifest cannot be read.
    """
    root = artifact_root(folder)
    manifest = Manifest.read(root / MANIFEST_NAME)
    copies = copied_manifests(root)
    objects = [root.parent, (store or Store()).objects]
    entry = Artifact(root).as_input(role="root")
    first = Node(**_recorded(entry), path=root, manifest_path=root / MANIFEST_NAME, manifest=manifest)
    nodes: dict[str, Node] = {}
    _visit(first, objects, copies, nodes)
    return Chain(root, tuple(reversed(nodes.values())))


def _visit(node: Node, objects: list[Path], copies: Mapping[str, Path], done: dict[str, Node]) -> None:
    """Depth first; a node is entered after everything it was made from."""
    for entry in node.manifest.inputs.values() if node.manifest else ():
        if entry.fingerprint not in done:
            _visit(_found(entry, objects, copies), objects, copies, done)
    done[node.fingerprint] = node


def _found(entry: InputEntry, objects: list[Path], copies: Mapping[str, Path]) -> Node:
    problem = None
    for folder in objects:
        path = folder / entry.fingerprint
        manifest_path = path / MANIFEST_NAME
        if os.path.lexists(manifest_path):
            try:
                return Node(
                    **_recorded(entry),
                    path=path,
                    manifest_path=manifest_path,
                    manifest=Manifest.read(manifest_path),
                )
            except InputError as error:
                problem = str(error)
    copy = copies.get(entry.fingerprint)
    if copy:
        return Node(**_recorded(entry), manifest_path=copy, manifest=Manifest.read(copy), problem=problem)
    return Node(**_recorded(entry), problem=problem)


def _recorded(entry: InputEntry) -> dict[str, Any]:
    return entry.model_dump(include={"asset", "partition", "fingerprint", "data_version", "role"})

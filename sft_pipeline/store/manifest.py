"""manifest.json: what an artifact is, what it was made from, and the hash of every file in it."""

import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

from sft_pipeline.errors import InputError
from sft_pipeline.store.files import sha256_file, sha256_json

FORMAT = 1
MANIFEST_NAME = "manifest.json"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class FileEntry(_Entry):
    """One file of an artifact. A volatile one is hashed for verification but is in no data version."""

    path: str
    bytes: int
    sha256: str
    volatile: bool = False


class InputEntry(_Entry):
    """An artifact that was read; `role` is "data", "acceptance" if only that was needed, or "rows" if rows
    were taken over from it.
    """

    asset: str
    partition: str
    fingerprint: str
    data_version: str
    role: str = "data"


class CheckRecord(TypedDict):
    """The outcome of one check."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    name: str
    blocking: bool
    passed: bool
    description: str


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.parts)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON, and cannot be hashed")


class Manifest(_Entry):
    """The manifest of one artifact.

    Attributes:
        format: Of this file.
        asset: The asset key, for example `access_policy_lora/packed_shards`.
        partition: The snapshot.
        fingerprint: SHA-256 over everything the artifact was made from; names its folder.
        data_version: SHA-256 over its files, the volatile ones left out.
        code_version: Of the stage's modules.
        config: What the stage read of the recipe or dataset file.
        inputs: By stage name, the artifacts that were read.
        reused_from: Earlier artifacts of the same stage, of any recipe, from which rows were taken over.
        accepted: Whether every blocking check passed. What is not accepted is no input.
        counts: Whole numbers about the rows and blocks.
        files: Every file but this one.
        environment: The machine, Python and libraries of the build.
        dagster_run_id: The Dagster run that built it, if any.
        mlflow_run_id: The MLflow run that its build reported to, if any.
        created_at: UTC, ISO 8601.
        outside: {what: SHA-256} of files read from outside the store.
        checks: name, blocking, passed and description of each.
        packages: The versions that are part of the fingerprint.
        identity: What of the configuration is part of the fingerprint, where that is not all of it.
    """

    format: int = FORMAT
    asset: str
    partition: str
    fingerprint: str
    data_version: str
    code_version: str
    config: dict[str, Any]
    inputs: dict[str, InputEntry]
    accepted: bool
    counts: dict[str, int]
    files: list[FileEntry]
    environment: dict[str, Any]
    dagster_run_id: str | None = None
    mlflow_run_id: str | None = None
    created_at: str
    reused_from: list[InputEntry] = Field(default_factory=list)
    outside: dict[str, str] = Field(default_factory=dict)
    checks: list[CheckRecord] = Field(default_factory=list)
    packages: dict[str, str | None] = Field(default_factory=dict)
    identity: dict[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads a manifest.

        Raises:
            InputError: The file is not a manifest of this format; the message names it.
        """
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
                raise InputError(f"{path}: not a regular file")
            manifest = cls.model_validate(json.loads(path.read_bytes(), parse_constant=_no_constant))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValidationError, ValueError, RecursionError) as error:
            raise InputError(
                f"{path}: not a readable manifest ({_first_line(error)}). In the store, delete its "
                "folder to have it rebuilt"
            ) from error
        if outside := [e.path for e in manifest.files if not _is_inside(e.path)]:
            raise InputError(f"{path}: not a readable manifest (it lists {outside[0]}, outside its folder)")
        if manifest.format != FORMAT:
            raise InputError(f"{path}: manifest format {manifest.format}, this version reads {FORMAT}")
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written, with `manifest_sha256` over the rest, so that a change is found."""
        # A manifest of an earlier version lacks the identity, and is written again as it was.
        absent = {"identity"} - self.model_fields_set
        data = self.model_dump(mode="json", exclude={"manifest_sha256"} | absent)
        for entry in data["files"]:
            if not entry["volatile"]:
                del entry["volatile"]
        return {**data, "manifest_sha256": sha256_json(data)}


def fingerprint_of_parts(
    *,
    asset: str,
    partition: str,
    code_version: str,
    identity: Mapping[str, Any],
    inputs: Mapping[str, str],
    outside: Mapping[str, str],
    packages: Mapping[str, str | None],
    blocking: Iterable[str],
) -> str:
    """SHA-256 over everything that decides what an artifact holds.

    Args:
        identity: What of the stage's configuration decides the result.
        inputs: {stage name: data version} of the artifacts that are read.
        outside: {what: SHA-256} of the files read from outside the store.
        packages: {distribution: version} of those that shape the output.
        blocking: The names of the checks that decide whether the artifact is accepted.
    """
    return sha256_json(
        {
            "asset": asset,
            "partition": partition,
            "code_version": code_version,
            "config": dict(identity),
            "inputs": dict(inputs),
            "outside": dict(outside),
            "packages": dict(packages),
            "blocking": sorted(blocking),
        }
    )


def recorded_fingerprint(manifest: Manifest) -> str:
    """The fingerprint that follows from the parts that a manifest records."""
    return fingerprint_of_parts(
        asset=manifest.asset,
        partition=manifest.partition,
        code_version=manifest.code_version,
        identity=manifest.config if manifest.identity is None else manifest.identity,
        inputs={n: entry.data_version for n, entry in manifest.inputs.items() if entry.role == "data"},
        outside=manifest.outside,
        packages=manifest.packages,
        blocking=[check["name"] for check in manifest.checks if check["blocking"]],
    )


def list_files(folder: Path, volatile: tuple[str, ...] = ()) -> list[FileEntry]:
    """Every file below `folder` except its manifest, sorted by path, with sizes and hashes.

    Args:
        volatile: Relative paths, or folders ending in "/", whose content may differ between equal builds.
    """
    entries = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            is_volatile = any(name == v or (v.endswith("/") and name.startswith(v)) for v in volatile)
            entries.append(
                FileEntry(
                    path=name, bytes=path.stat().st_size, sha256=sha256_file(path), volatile=is_volatile
                )
            )
    return entries


def data_version(files: list[FileEntry]) -> str:
    """SHA-256 over the sorted (path, sha256) pairs of the files that are not volatile."""
    return sha256_json(sorted([f.path, f.sha256] for f in files if not f.volatile))

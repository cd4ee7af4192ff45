"""An artifact on disk: its folder and its manifest."""

import errno
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sft_pipeline.errors import InputError
from sft_pipeline.store.files import sha256_file
from sft_pipeline.store.manifest import MANIFEST_NAME, InputEntry, Manifest


@dataclass(frozen=True)
class Artifact:
    """An immutable folder with a manifest. `path` is absolute."""

    path: Path

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.read(self.path / MANIFEST_NAME)

    def file(self, name: str) -> Path:
        """The absolute path of one file or folder of the artifact."""
        return self.path / name

    def parts(self, folder: str) -> list[Path]:
        """The Parquet parts of one folder, in row order."""
        return sorted((self.path / folder).glob("*.parquet"))

    def as_input(self, role: str = "data") -> InputEntry:
        """What the manifest of a consumer records of this artifact."""
        names = ("asset", "partition", "fingerprint", "data_version")
        return InputEntry(**{name: getattr(self.manifest, name) for name in names}, role=role)

    def damage(self, *, deep: bool) -> list[str]:
        """What is wrong with the files, one line each naming the file; empty when intact.

        Args:
            deep: Hash every file, the manifest among them; otherwise only compare sizes and modification
                times against the manifest's.
        """
        found = []
        written = (self.path / MANIFEST_NAME).stat().st_mtime
        if deep:
            recorded = json.loads((self.path / MANIFEST_NAME).read_bytes()).get("manifest_sha256")
            if recorded != self.manifest.to_json()["manifest_sha256"]:
                found.append(f"{self.path / MANIFEST_NAME}: it was changed after it was written")
        for entry in self.manifest.files:
            path = self.path / entry.path
            try:
                status = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                found.append(f"{path}: missing")
                continue
            if status.st_size != entry.bytes:
                found.append(f"{path}: {status.st_size} bytes, the manifest says {entry.bytes}")
            elif (deep or status.st_mtime > written) and sha256_file(path) != entry.sha256:
                found.append(f"{path}: its SHA-256 differs from the manifest's")
        return found

    def verify(self, *, deep: bool = False) -> None:
        """Looks for missing and changed files.

        Args:
            deep: As in `damage`.

        Raises:
            InputError: There is one; the message names the first one and the remedy.
        """
        found = self.damage(deep=deep)
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise InputError(
                f"corrupt artifact of {self.manifest.asset}: {found[0]}{more}. "
                f"Delete the folder {self.path} to have it rebuilt"
            )

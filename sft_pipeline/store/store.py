"""Objects and refs under SFT_HOME.

objects/<fingerprint>/              immutable artifacts, each with a manifest.json
refs/<asset key>/<partition>.json   the current artifact of an asset
refs/.runs/<run id>/...             what one Dagster run made, so that its later steps read exactly that
staging/<fingerprint>/              being built; swept when its builder is gone
trash/                              collected by `sft gc`, no part of the store any more; being deleted
pins/<fingerprint>.json             what `sft gc` keeps because somebody said so
work/<fingerprint>/                 resumable training
"""

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.project import sft_home
from sft_pipeline.store import files
from sft_pipeline.store.artifact import Artifact
from sft_pipeline.store.manifest import MANIFEST_NAME, Manifest, data_version, list_files
from sft_pipeline.store.partition_names import why_unusable
from sft_pipeline.store.uses import StoreUse, using


class Store:
    """The artifact store in one folder.

    Args:
        home: The folder; `$SFT_HOME` by default.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or sft_home()
        self.objects = self.home / "objects"
        self.refs = self.home / "refs"
        self.staging = self.home / "staging"
        self.locks = self.home / "locks"
        self.trash = self.home / "trash"
        self.pins = self.home / "pins"

    # -- objects ---------------------------------------------------------------------------------------------

    def get(self, fingerprint: str) -> Artifact | None:
        """The artifact of this fingerprint, or None where it is not built."""
        artifact = Artifact(self.objects / fingerprint)
        return artifact if (artifact.path / MANIFEST_NAME).is_file() else None

    def all(self, unreadable: Callable[[InputError], None] = lambda error: None) -> list[Artifact]:
        """Every artifact, by time of creation.

        Args:
            unreadable: Told of those whose manifest cannot be read; they are left out.
        """
        found = []
        for path in sorted(self.objects.glob(f"*/{MANIFEST_NAME}")) if self.objects.is_dir() else ():
            artifact = Artifact(path.parent)
            try:
                found.append((artifact.manifest.created_at, artifact))
            except InputError as error:
                unreadable(error)
        return [artifact for _, artifact in sorted(found, key=lambda pair: pair[0])]

    def work(self, fingerprint: str) -> Path:
        """The folder for what a killed build may go on from, for example training checkpoints."""
        return self.home / "work" / fingerprint

    def using(self) -> contextlib.AbstractContextManager[StoreUse]:
        """Notes what this process uses, which `sft gc` then leaves alone."""
        return using(self.locks)

    def discard(self, folder: Path) -> Path:
        """Takes a folder of objects/ or work/ out of the store by one rename; returns its new place.

        Whatever dies now, it is either whole and in the store, or no part of it; `sweep` deletes the rest.
        """
        self.trash.mkdir(parents=True, exist_ok=True)
        target = self.trash / f"{folder.parent.name}-{folder.name}-{uuid.uuid4().hex[:8]}"
        os.replace(folder, target)
        files.fsync_path(folder.parent)
        return target

    @contextlib.contextmanager
    def building(self, fingerprint: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
        """An empty staging folder, with this fingerprint locked against a second builder.

        A second builder waits here; it should look with `get` again once inside.
        """
        lock = self.locks / f"{fingerprint}.lock"
        with contextlib.ExitStack() as stack:
            with files.clear_disk_errors("preparing the artifact store"):
                try:
                    stack.enter_context(files.locked(lock, wait_seconds=0))
                except TimeoutError:
                    on_wait()
                    stack.enter_context(files.locked(lock))
                folder = self.staging / fingerprint
                files.remove_tree(folder)
                folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                files.remove_tree(folder)

    def commit(self, folder: Path, *, volatile: Sequence[str], fields: Mapping[str, Any]) -> Artifact:
        """Makes a staged folder an artifact: files flushed, manifest last, one rename.

        Args:
            folder: A staging folder that `building` gave, named by its fingerprint.
            volatile: Paths left out of the data version.
            fields: The rest of the manifest's fields.
        """
        entries = list_files(folder, tuple(volatile))
        manifest = Manifest(
            files=entries,
            fingerprint=folder.name,
            data_version=data_version(entries),
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            **fields,
        )
        files.fsync_tree(folder)
        files.write_json(folder / MANIFEST_NAME, manifest.to_json())
        self.objects.mkdir(parents=True, exist_ok=True)
        target = self.objects / folder.name
        if target.exists():  # one that was not accepted; `sweep` puts it back if this process dies in between
            aside = self.staging / f"{folder.name}.old"
            files.remove_tree(aside)
            os.replace(target, aside)
        os.replace(folder, target)
        files.fsync_path(self.objects)
        files.remove_tree(self.staging / f"{folder.name}.old")
        return Artifact(target)

    def sweep(self) -> list[str]:
        """Removes staging folders whose builder is gone, and returns their names; empties trash/.

        An artifact that was being replaced, and whose successor never came, is put back.
        """
        swept = []
        for folder in self.trash.glob("*"):
            files.remove_tree(folder)
        for folder in sorted(self.staging.glob("*")):
            with contextlib.suppress(TimeoutError):
                fingerprint, _, replaced = folder.name.partition(".")
                with files.locked(self.locks / f"{fingerprint}.lock", wait_seconds=0):
                    if replaced and not (self.objects / fingerprint).exists():
                        os.replace(folder, self.objects / fingerprint)
                        continue
                    files.remove_tree(folder)
                    swept.append(folder.name)
        return swept

    # -- refs ------------------------------------------------------------------------------------------------

    def _ref(self, asset: str, partition: str, run_id: str | None = None) -> Path:
        if why := why_unusable(partition):  # Dagster takes any name that is typed into its UI
            raise InputError(f"the partition {partition!r} {why}")
        base = self.refs / ".runs" / run_id if run_id else self.refs
        return base / asset / f"{partition}.json"

    def set_ref(self, artifact: Artifact, *, run_id: str | None, current: bool) -> None:
        """Names `artifact` as its asset's current one (`current`), and as what the run `run_id` made."""
        m = artifact.manifest
        names = ("asset", "partition", "fingerprint", "data_version")
        value = {name: getattr(m, name) for name in names}
        if run_id:
            files.write_json(self._ref(m.asset, m.partition, run_id), value)
        if current:
            files.write_json(self._ref(m.asset, m.partition), value)

    def recorded_version(self, manifest: Manifest) -> str | None:
        """The data version that a ref (the asset's, or that of the run which made it) records of an artifact;
        None where they name others."""
        for run_id in (manifest.dagster_run_id, None):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, InputError):
                ref = json.loads(self._ref(manifest.asset, manifest.partition, run_id).read_bytes())
                if ref["fingerprint"] == manifest.fingerprint:
                    return str(ref["data_version"])
        return None

    def resolve(self, asset: str, partition: str, run_ids: Sequence[str] = ()) -> Artifact | None:
        """What the runs `run_ids` made of this asset, first one first, else the current artifact, else None.

        Raises:
            InputError: The ref names an artifact that is not in the store.
        """
        for path in [*(self._ref(asset, partition, r) for r in run_ids), self._ref(asset, partition)]:
            if path.is_file():
                fingerprint = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
                artifact = self.get(fingerprint)
                if artifact is None:
                    raise InputError(
                        f"{path} names the artifact {fingerprint}, which is gone: materialize {asset} again"
                    )
                return artifact
        return None

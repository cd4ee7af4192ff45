"""Who uses what of the store right now, so that nothing is collected that a running process is about to read.

A process that resolves a ref, or finds an artifact to reuse, does it while `locks/collect.lock` is shared,
and notes the fingerprint before it lets go. `sft gc` decides and removes while it holds that lock alone. A
note is a file of `locks/uses/` that its process keeps locked: the kernel releases it when the process dies.
"""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from sft_pipeline.store import files


class StoreUse:
    """What one process uses: fingerprints, and runs of which it uses all that they made.

    Args:
        locks: The store's folder of locks.
        handle: Of the note, open and locked.
    """

    def __init__(self, locks: Path, handle: int) -> None:
        self._locks, self._handle = locks, handle
        self._noted: dict[str, set[str]] = {"fingerprints": set(), "runs": set()}

    def steady(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is collected inside; waits for a collection that goes on. For short sections."""
        return files.locked(self._locks / "collect.lock", shared=True)

    def add(self, fingerprints: Iterable[str] = (), runs: Iterable[str] = ()) -> None:
        """Notes what is used until the process is done; inside `steady`, before it is relied on.

        Args:
            runs: Beginnings of run ids.
        """
        self._noted["fingerprints"].update(fingerprints)
        self._noted["runs"].update(runs)
        text = json.dumps({name: sorted(values) for name, values in self._noted.items()}).encode()
        # In place: a file that replaced it would not be the locked one. Nobody reads while `steady` is held.
        os.pwrite(self._handle, text, 0)
        os.ftruncate(self._handle, len(text))


@contextlib.contextmanager
def using(locks: Path) -> Iterator[StoreUse]:
    """A note of this process, for as long as the context lasts."""
    folder = locks / "uses"
    with files.clear_disk_errors("preparing the artifact store"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex}.json"
        with files.locked(locks / "collect.lock", shared=True):  # else it could be read before it is locked
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield StoreUse(locks, handle)
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def collecting(locks: Path, *, wait_seconds: float) -> Iterator[tuple[set[str], set[str]]]:
    """(fingerprints, beginnings of run ids) that processes use, while no process can begin to use another.

    Raises:
        TimeoutError: A process looks for artifacts for longer than `wait_seconds`.
    """
    with files.locked(locks / "collect.lock", wait_seconds=wait_seconds):
        fingerprints: set[str] = set()
        runs: set[str] = set()
        for path in sorted((locks / "uses").glob("*.json")):
            try:
                with files.locked(path, wait_seconds=0):
                    path.unlink(missing_ok=True)  # its process was killed
            except TimeoutError:
                noted = json.loads(path.read_bytes() or b"{}")
                fingerprints.update(noted.get("fingerprints", ()))
                runs.update(noted.get("runs", ()))
        yield fingerprints, runs

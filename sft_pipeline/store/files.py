"""The store's only contact with the file system: hashing, durable writes, locks and renames.

An object store can replace this module later: there writing the manifest last does what the rename does here.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError, SftError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# The system's words, SQLite's, and those of torch's writer.
_FULL = (
    os.strerror(errno.ENOSPC),
    os.strerror(errno.EDQUOT),
    "database or disk is full",
    "file write failed",
)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: It cannot be read, or is no regular file: a pipe would be waited for.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no white space)."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON bytes that are equal for equal values: sorted keys, no white space, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fsync_path(path: Path) -> None:
    """Flushes one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(root) / name)
        fsync_path(Path(root))


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step: whoever reads sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, wait_seconds: float | None = None, shared: bool = False) -> Iterator[None]:
    """Holds a lock on `path` (made if absent); the kernel releases it when the process dies.

    Args:
        wait_seconds: How long to wait for another holder; None waits for ever, 0 tries once.
        shared: Others may hold it too, if they share it; else this process alone holds it.

    Raises:
        TimeoutError: Another process still holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(f"{path} is locked by another process") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked_if_possible(path: Path, *, wait_seconds: float = 30.0) -> Iterator[None]:
    """As `locked`, for what usually also works without: a warning where the lock cannot be had in time.

    Some network file systems have no locks.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path, wait_seconds=wait_seconds))
        except OSError as error:
            if not isinstance(error, TimeoutError) and error.errno not in _NO_LOCKS:
                raise
            logging.getLogger(__name__).warning("going on without a lock: %s", error)
        yield


@contextlib.contextmanager
def clear_disk_errors(action: str) -> Iterator[None]:
    """Turns a full disk, a quota or a read-only folder into one clear message."""
    try:
        yield
    except SftError:
        raise
    except Exception as error:
        clear = as_disk_error(error, action)
        if clear is None:
            raise
        raise clear from error


def as_disk_error(error: BaseException, action: str) -> InputError | None:
    """The message for a disk that is full, or refuses access; None for any other error.

    Libraries hide the system's error in their own: SQLite, safetensors and torch keep its text alone.
    """
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(w in text for w in _FULL):
            return InputError(
                f"no space left on the disk while {action}: free some space and run again; "
                "nothing half-written was kept"
            )
        if "disk I/O error" in text:  # SQLite's, which does not say more
            return InputError(f"the disk is full, or it fails, while {action}: free some space and run again")
        if cause is error and isinstance(cause, OSError) and cause.errno in _REFUSED:
            return InputError(
                f"access refused while {action}: {text}. Check the permissions; what lies below SFT_HOME can "
                "be put elsewhere by setting it"
            )
        cause = cause.__cause__ or cause.__context__
    return None

"""A checkpoint as a bundle: whole or not there at all.

    checkpoint-200/
      bundle.json               the eleven items: a value, or files with their SHA-256. Written last.
      adapter_model.safetensors, adapter_config.json     (or model.safetensors, config.json, ...)
      optimizer.safetensors, optimizer.json, scheduler.json, rng.json, curves.json, trainer_state.json

Written under another name, flushed to the disk, then renamed. Nothing in it is a pickle, and its bytes depend only on
what was trained: no clock, no path.
"""

import errno
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.reporting import Reporter
from sft_pipeline.store.files import clear_disk_errors, fsync_tree, remove_tree, sha256_file

ITEMS = (
    "model",
    "optimizer",
    "scheduler",
    "global_step",
    "rng",
    "sampler_position",
    "tokenizer_version",
    "chat_template_version",
    "data_manifest",
    "eval_manifest",
    "best_metric",
)
FORMAT = 1
BUNDLE = "bundle.json"
PREFIX = "checkpoint-"


class NotResumable(Exception):
    """The folder is not a whole checkpoint; the message says why."""


@dataclass(frozen=True)
class Bundle:
    """A checkpoint whose eleven items are there and whose files have been hashed.

    `items[name]` is {"value": ...} or {"files": {path: sha256}}.
    """

    path: Path
    items: Mapping[str, Mapping[str, Any]]

    @property
    def step(self) -> int:
        return int(self.items["global_step"]["value"])

    def value(self, item: str) -> Any:
        return self.items[item]["value"]


def write_bundle(
    parent: Path, step: int, write: Callable[[Path], Mapping[str, Iterable[str]]], values: Mapping[str, Any]
) -> Path:
    """Commits `parent/checkpoint-<step>`.

    Args:
        write: Writes files into the folder it is given; returns {item: file names}. Items beyond the eleven are kept
            and verified with them.
        values: Items that are plain JSON values.

    Raises:
        InputError: The disk is full or read-only. Earlier checkpoints are as they were.
        ValueError: An item is missing.
    """
    target, aside = parent / f"{PREFIX}{step}", parent / f".{PREFIX}{step}.partial"
    parent.mkdir(parents=True, exist_ok=True)
    remove_tree(aside)
    try:
        with clear_disk_errors(f"saving {target}"), _disk_errors_of_safetensors():
            aside.mkdir()
            files = write(aside)
            items: dict[str, Any] = {
                item: {"files": {name: sha256_file(aside / name) for name in sorted(names)}}
                for item, names in files.items()
            }
            items |= {item: {"value": value} for item, value in values.items()}
            missing = [i for i in ITEMS if i not in items]
            if missing:
                raise ValueError(f"a checkpoint without {', '.join(missing)} could not be resumed")
            fsync_tree(aside)
            text = json.dumps(
                {"format": FORMAT, "items": dict(sorted(items.items()))},
                indent=2,
                sort_keys=True,
                allow_nan=False,
            )
            (aside / BUNDLE).write_text(text + "\n", encoding="utf-8")
            fsync_tree(aside)
            remove_tree(target)
            aside.rename(target)
            fsync_tree_top(parent)
    finally:
        remove_tree(aside)
    return target


def fsync_tree_top(folder: Path) -> None:
    from sft_pipeline.store.files import fsync_path

    fsync_path(folder)


class _disk_errors_of_safetensors:
    """safetensors raises its own error class for a full disk: given back as the OSError that it was."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, OSError):
            for code in (errno.ENOSPC, errno.EDQUOT):
                if f"os error {code}" in str(error):
                    raise OSError(code, str(error)) from error


def read_bundle(path: Path) -> Bundle:
    """Verifies a checkpoint folder, every file by its hash.

    Raises:
        NotResumable: With the first reason.
    """
    try:
        data = json.loads((path / BUNDLE).read_text(encoding="utf-8"))
        items = data["items"]
    except FileNotFoundError:
        raise NotResumable(f"{path}: no {BUNDLE}: it was never finished") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise NotResumable(f"{path / BUNDLE}: not readable ({error})") from error
    if data.get("format") != FORMAT:
        raise NotResumable(f"{path / BUNDLE}: format {data.get('format')}, this version reads {FORMAT}")
    missing = [item for item in ITEMS if item not in items]
    if missing:
        raise NotResumable(f"{path}: without {', '.join(missing)} it cannot be resumed")
    for item, entry in items.items():
        if "files" not in entry and "value" not in entry:
            raise NotResumable(f"{path}: {item} has neither a value nor files")
        for name, digest in entry.get("files", {}).items():
            file = path / name
            if not file.is_file():
                raise NotResumable(f"{path}: {item}: {name} is missing")
            if sha256_file(file) != digest:
                raise NotResumable(f"{path}: {item}: the SHA-256 of {name} differs from {BUNDLE}'s")
        if not entry.get("files", True):
            raise NotResumable(f"{path}: {item} names no file")
    return Bundle(path, items)


def checkpoint_folders(parent: Path) -> list[Path]:
    """checkpoint-<step> folders by step, whole or not."""
    found = [p for p in parent.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def latest_whole(parent: Path, report: Reporter) -> Bundle | None:
    """The newest checkpoint that can be resumed; those that cannot are passed over with a line in the log."""
    for path in reversed(checkpoint_folders(parent)):
        try:
            return read_bundle(path)
        except NotResumable as why:
            report.log(f"not resuming from {path.name}: {why}", "warning")
    return None


def retire(parent: Path, keep_last: int | None, best_step: int | None) -> list[int]:
    """Deletes all but the last `keep_last` checkpoints and the best one. Returns the deleted steps."""
    if keep_last is None:
        return []
    gone = []
    for path in checkpoint_folders(parent)[:-keep_last]:
        step = int(path.name.removeprefix(PREFIX))
        if step != best_step:
            remove_tree(path)
            gone.append(step)
    return gone

"""A checkpoint: what it must hold, how it is written whole or not at all, how it is verified and put back.

    checkpoint-200/
      bundle.json               the required items: a value, or files with their SHA-256. Written last.
      adapter_model.safetensors, adapter_config.json     (or model.safetensors, config.json, ...)
      optimizer.safetensors, optimizer.json, scheduler.json, rng.json, curves.parquet, trainer_state.json

Written under another name, flushed to the disk, then renamed. Nothing in it is a pickle, and its bytes depend
only on what was trained: no clock, no path.
"""

import base64
import contextlib
import errno
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from sft_pipeline.reporting import Reporter
from sft_pipeline.store.files import clear_disk_errors, fsync_path, fsync_tree, remove_tree, sha256_file
from sft_pipeline.training.process import seed_all

REQUIRED_ITEMS = (
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
# Of transformers' state of the loop: no log history, which has the clock in it.
LOOP_COUNTERS = (
    "global_step",
    "max_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "train_batch_size",
    "num_train_epochs",
)
FORMAT = 1
INDEX = "bundle.json"
PREFIX = "checkpoint-"


class NotResumable(Exception):
    """The folder is not a whole checkpoint; the message says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose required items are there and whose files have been hashed.

    `items[name]` is {"value": ...} or {"files": {path: sha256}}.
    """

    path: Path
    items: Mapping[str, Mapping[str, Any]]

    @property
    def step(self) -> int:
        """The last update that it has seen, counted from 1."""
        return int(self.items["global_step"]["value"])

    def value(self, item: str) -> Any:
        return self.items[item]["value"]


def write_checkpoint(
    parent: Path, step: int, write: Callable[[Path], Mapping[str, Iterable[str]]], values: Mapping[str, Any]
) -> Path:
    """Commits `parent/checkpoint-<step>`.

    Args:
        write: Writes files into the folder it is given; returns {item: file names}. Items beyond the required
            ones are kept and verified with them.
        values: Items that are plain JSON values.

    Raises:
        InputError: The disk is full or read-only. Earlier checkpoints are as they were.
        ValueError: A required item is missing.
    """
    target, aside = parent / f"{PREFIX}{step}", parent / f".{PREFIX}{step}.partial"
    parent.mkdir(parents=True, exist_ok=True)
    remove_tree(aside)
    try:
        with clear_disk_errors(f"saving {target}"), _os_errors_of_safetensors():
            aside.mkdir()
            files = write(aside)
            items: dict[str, Any] = {
                item: {"files": {name: sha256_file(aside / name) for name in sorted(names)}}
                for item, names in files.items()
            }
            items |= {item: {"value": value} for item, value in values.items()}
            missing = [i for i in REQUIRED_ITEMS if i not in items]
            if missing:
                raise ValueError(f"a checkpoint without {', '.join(missing)} could not be resumed")
            fsync_tree(aside)
            index = {"format": FORMAT, "items": items}
            text = json.dumps(index, indent=2, sort_keys=True, allow_nan=False)
            (aside / INDEX).write_text(text + "\n", encoding="utf-8")
            fsync_tree(aside)
            remove_tree(target)
            aside.rename(target)
            fsync_path(parent)
    finally:
        remove_tree(aside)
    return target


@contextlib.contextmanager
def _os_errors_of_safetensors() -> Iterator[None]:
    """safetensors raises its own error class for a full disk: given back as the OSError that it was."""
    try:
        yield
    except Exception as error:
        for code in (errno.ENOSPC, errno.EDQUOT):
            if not isinstance(error, OSError) and f"os error {code}" in str(error):
                raise OSError(code, str(error)) from error
        raise


def read_checkpoint(path: Path) -> Checkpoint:
    """Verifies a checkpoint folder, every file by its hash.

    Raises:
        NotResumable: With the first reason.
    """
    try:
        data = json.loads((path / INDEX).read_text(encoding="utf-8"))
        items = data["items"]
    except FileNotFoundError:
        raise NotResumable(f"{path}: no {INDEX}: it was never finished") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise NotResumable(f"{path / INDEX}: not readable ({error})") from error
    if data.get("format") != FORMAT:
        raise NotResumable(f"{path / INDEX}: format {data.get('format')}, this version reads {FORMAT}")
    missing = [item for item in REQUIRED_ITEMS if item not in items]
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
                raise NotResumable(f"{path}: {item}: the SHA-256 of {name} differs from {INDEX}'s")
        if not entry.get("files", True):
            raise NotResumable(f"{path}: {item} names no file")
    return Checkpoint(path, items)


def step_of(folder: Path) -> int:
    """200 of a folder `checkpoint-200`."""
    return int(folder.name.removeprefix(PREFIX))


def checkpoint_folders(parent: Path) -> list[Path]:
    """checkpoint-<step> folders by step, whole or not."""
    found = [p for p in parent.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def latest_checkpoint(parent: Path, report: Reporter, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that can be resumed; those that cannot are passed over with a line in the log.

    Args:
        before: Only one that has not seen this update (counted from 1).
    """
    for path in reversed(checkpoint_folders(parent)):
        if before is None or step_of(path) < before:
            try:
                return read_checkpoint(path)
            except NotResumable as why:
                report.log(f"not resuming from {path.name}: {why}", "warning")
    return None


def retire_checkpoints(parent: Path, keep_last: int | None, best_step: int | None) -> list[int]:
    """Deletes all but the last `keep_last` checkpoints and the best one. Returns the deleted steps."""
    old = checkpoint_folders(parent)[:-keep_last] if keep_last else []
    retired = [path for path in old if step_of(path) != best_step]
    for path in retired:
        remove_tree(path)
    return [step_of(path) for path in retired]


# What is saved of a trainer beside the weights, as safetensors and JSON, by name


def save_training_state(trainer: Any, folder: Path, rng_states: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Writes optimizer, schedule, random states and the loop's counters. Returns {item: file names}.

    Args:
        rng_states: Of every rank, as `all_rng_states` gives them.
    """
    optimizer = save_optimizer(trainer.optimizer, trainer.model, folder, trainer.accelerator.scaler)
    # The rate of an update is a function of the recipe, no state: only what is plain is kept.
    scheduler = trainer.lr_scheduler.state_dict()
    _write(folder / "scheduler.json", {k: v for k, v in scheduler.items() if _is_plain(v)})
    _write(folder / "rng.json", rng_states)
    counters = {name: getattr(trainer.state, name) for name in LOOP_COUNTERS}
    TrainerState(**counters).save_to_json(str(folder / "trainer_state.json"))
    return {
        "optimizer": optimizer,
        "scheduler": ["scheduler.json"],
        "rng": ["rng.json"],
        "trainer_state": ["trainer_state.json"],
    }


def load_training_state(trainer: Any, checkpoint: Checkpoint) -> None:
    """Puts all of that back into a trainer whose loop is about to begin, and this rank's random state.

    A run resumed with another number of ranks draws anew from (seed, step, rank).
    """
    folder, feed, step = checkpoint.path, trainer.feed, checkpoint.step
    trainer.state.global_step = step
    load_optimizer(trainer.optimizer, trainer.model, folder, trainer.accelerator.scaler)
    scheduler = trainer.lr_scheduler
    scheduler.load_state_dict({**scheduler.state_dict(), **_read(folder / "scheduler.json")})
    states = _read(folder / "rng.json")
    if len(states) == feed.world:
        set_rng_state(states[feed.rank])
    else:
        seed_all((trainer.training.seed * 1_000_003 + step * 1_009 + feed.rank) % (1 << 32))


def save_optimizer(optimizer: Any, model: Any, folder: Path, scaler: Any = None) -> list[str]:
    """Writes optimizer.safetensors ("<parameter>|<moment>") and optimizer.json. Returns the file names."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    groups, tensors = [], {}
    for group, names in zip(optimizer.param_groups, _parameter_names(optimizer, model), strict=True):
        plain = (int, float, bool, str, list, tuple, type(None))
        settings = {k: v for k, v in group.items() if k != "params" and isinstance(v, plain)}
        groups.append({"names": names, **settings})
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, str(folder / "optimizer.safetensors"))
    state = {"class": type(optimizer).__name__, "groups": groups}
    _write(folder / "optimizer.json", state | {"scaler": scaler.state_dict() if scaler is not None else None})
    return ["optimizer.safetensors", "optimizer.json"]


def load_optimizer(optimizer: Any, model: Any, folder: Path, scaler: Any = None) -> None:
    """Puts the moments back by parameter name.

    Raises:
        ValueError: The checkpoint was made by another optimizer, or for other parameters.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    data, tensors = _read(folder / "optimizer.json"), load_file(str(folder / "optimizer.safetensors"))
    names = _parameter_names(optimizer, model)
    if data["class"] != type(optimizer).__name__ or [g["names"] for g in data["groups"]] != names:
        raise ValueError(f"{folder}: its optimizer state belongs to another optimizer or other parameters")
    state = optimizer.state_dict()
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("|")
        by_name.setdefault(name, {})[moment] = value
    index = [i for group in state["param_groups"] for i in group["params"]]
    ordered = [n for group in names for n in group]
    state["state"] = {i: by_name[n] for i, n in zip(index, ordered, strict=True) if n in by_name}
    for group, saved in zip(state["param_groups"], data["groups"], strict=True):
        # JSON has no tuples: the betas come back as a list.
        group |= {
            k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items() if k != "names"
        }
    optimizer.load_state_dict(state)
    if scaler is not None and data["scaler"]:
        scaler.load_state_dict(data["scaler"])


def _parameter_names(optimizer: Any, model: Any) -> list[list[str]]:
    """By optimizer group, in the optimizer's order."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(v, (int, float)) for v in value)
    return isinstance(value, (int, float, bool, str, type(None)))


def rng_state() -> dict[str, Any]:
    """This process's random states: Python, NumPy, torch, and its GPU's."""

    def pack(tensor: torch.Tensor) -> str:
        return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()

    version, inner, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(inner), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": pack(torch.get_rng_state()),
        "cuda": pack(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    def unpack(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(unpack(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(unpack(state["cuda"]))


def all_rng_states() -> list[dict[str, Any]]:
    """The states of every rank, in order. Called by all of them together."""
    own = rng_state()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

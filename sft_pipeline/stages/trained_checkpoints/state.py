"""What a bundle holds beside the weights: optimizer, schedule, random state. As safetensors and JSON, by name."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _named(optimizer: Any, model: Any) -> list[list[str]]:
    """Parameter names by optimizer group, in the optimizer's order."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def save_optimizer(optimizer: Any, model: Any, folder: Path, scaler: Any = None) -> list[str]:
    """Writes optimizer.safetensors ("<parameter>|<moment>") and optimizer.json. Returns the file names."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    groups, tensors = [], {}
    for group, names in zip(optimizer.param_groups, _named(optimizer, model), strict=True):
        groups.append(
            {
                "names": names,
                **{
                    k: v
                    for k, v in group.items()
                    if k != "params" and isinstance(v, (int, float, bool, str, list, tuple, type(None)))
                },
            }
        )
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    save_file(tensors, str(folder / "optimizer.safetensors"))
    _write(
        folder / "optimizer.json",
        {
            "class": type(optimizer).__name__,
            "groups": groups,
            "scaler": scaler.state_dict() if scaler is not None else None,
        },
    )
    return ["optimizer.safetensors", "optimizer.json"]


def load_optimizer(optimizer: Any, model: Any, folder: Path, scaler: Any = None) -> None:
    """Puts the moments back by parameter name.

    Raises:
        ValueError: The checkpoint was made by another optimizer, or for other parameters.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    data, tensors = _read(folder / "optimizer.json"), load_file(str(folder / "optimizer.safetensors"))
    names = _named(optimizer, model)
    if data["class"] != type(optimizer).__name__ or [g["names"] for g in data["groups"]] != names:
        raise ValueError(f"{folder}: its optimizer state belongs to another optimizer or other parameters")
    state = optimizer.state_dict()
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("|")
        by_name.setdefault(name, {})[moment] = value
    index = [i for group in state["param_groups"] for i in group["params"]]
    state["state"] = {
        i: by_name[n]
        for i, n in zip(index, [n for group in names for n in group], strict=True)
        if n in by_name
    }
    for group, saved in zip(state["param_groups"], data["groups"], strict=True):
        group.update(
            {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items() if k != "names"}
        )
    optimizer.load_state_dict(state)
    if scaler is not None and data["scaler"]:
        scaler.load_state_dict(data["scaler"])


def save_scheduler(scheduler: Any, folder: Path) -> list[str]:
    plain = {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)}
    _write(folder / "scheduler.json", plain)
    return ["scheduler.json"]


def load_scheduler(scheduler: Any, folder: Path) -> None:
    scheduler.load_state_dict({**scheduler.state_dict(), **_read(folder / "scheduler.json")})


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, str, type(None))) or (
        isinstance(value, (list, tuple)) and all(isinstance(v, (int, float)) for v in value)
    )


def rng_state() -> dict[str, Any]:
    """This process's random states: Python, NumPy, torch, and its GPU's."""
    version, inner, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": [version, list(inner), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _pack(torch.get_rng_state()),
        "cuda": _pack(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_unpack(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_unpack(state["cuda"]))


def all_rng_states() -> list[dict[str, Any]]:
    """The states of every rank, in order. Called by all of them together."""
    own = rng_state()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, own)
    return states


def save_rng(states: list[dict[str, Any]], folder: Path) -> list[str]:
    _write(folder / "rng.json", states)
    return ["rng.json"]


def load_rng(folder: Path, rank: int, world: int, seed: int, step: int) -> None:
    """Puts this rank's random state back. A run resumed with another number of ranks draws anew from (seed, step, rank)."""
    states = _read(folder / "rng.json")
    if len(states) == world:
        set_rng_state(states[rank])
        return
    fresh = (seed * 1_000_003 + step * 1_009 + rank) % (1 << 32)
    random.seed(fresh)
    np.random.seed(fresh)
    torch.manual_seed(fresh)


def _pack(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()


def _unpack(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def save_trainer_state(trainer_state: Any, folder: Path) -> list[str]:
    """What the loop reads when it starts in the middle; no log history, which has the clock in it."""
    from transformers import TrainerState

    kept = (
        "global_step",
        "max_steps",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "train_batch_size",
        "num_train_epochs",
    )
    TrainerState(**{name: getattr(trainer_state, name) for name in kept}).save_to_json(
        str(folder / "trainer_state.json")
    )
    return ["trainer_state.json"]

"""Where the base model is. Light: no torch."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.learning.config import ModelConfig
from sft_pipeline.project import project_path

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def base_folder(config: ModelConfig) -> Path:
    """The folder of the base model: a local one, or the hub's at a pinned commit, fetched once into the hub's cache.

    Raises:
        InputError: There is no such folder and it is no hub id, the hub id has no pinned commit, or the hub cannot
            be reached.
    """
    folder = model_folder(config.base, config.revision, "model.base", remote_code=config.trust_remote_code)
    if not (folder / "config.json").is_file():
        raise InputError(f"model.base {config.base}: {folder} has no config.json, so it is no model folder")
    return folder


def tokenizer_folder(config: ModelConfig) -> Path:
    """The folder of the tokenizer: its own (a hub id may be pinned as owner/name@commit), or the base's.

    Raises:
        InputError: As `base_folder`.
    """
    if config.tokenizer is None:
        return base_folder(config)
    name, _, own = (
        config.tokenizer.partition("@")
        if HUB_ID.match(config.tokenizer.partition("@")[0])
        else (config.tokenizer, "", "")
    )
    return model_folder(name, own or config.revision, "model.tokenizer")


def model_folder(name: str, revision: str | None, key: str, *, remote_code: bool = False) -> Path:
    """A local folder as it is, a hub id as its snapshot. `key` names the recipe's key in errors."""
    folder = project_path(name)
    if folder.is_dir():
        return folder
    if not HUB_ID.match(name):
        raise InputError(
            f"{key} {name}: no such folder ({folder}), and it is no hub id (OWNER/NAME). Mend the path in the recipe"
        )
    if not revision:
        raise InputError(
            f"{key} {name}: no such folder ({folder}); if it is a hub id, pin model.revision to a commit"
        )
    from huggingface_hub import snapshot_download

    fetch: dict[str, Any] = {
        "repo_id": name,
        "revision": revision,
        "allow_patterns": [*MODEL_FILES, *(["*.py"] if remote_code else [])],
    }
    with contextlib.suppress(Exception):
        return Path(snapshot_download(**fetch, local_files_only=True))
    with clear_loading_errors(f"{key} {name}"):
        return Path(snapshot_download(**fetch))


@contextlib.contextmanager
def clear_loading_errors(what: str) -> Iterator[None]:
    """Turns what the libraries raise for a model that is absent, unreachable or unsafe into one clear message."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(
            f"{what} cannot be loaded: {first}. Check the name, the pinned commit, HF_TOKEN and the network, and that it has safetensors"
        ) from error


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight, from the headers of the safetensors files; no weight is read.

    Raises:
        InputError: The folder has no safetensors, or a header cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no safetensors files. Only those are loaded: convert the model first")
    for path in files:
        try:
            with path.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (ValueError, OSError, MemoryError, OverflowError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error})") from error
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return shapes

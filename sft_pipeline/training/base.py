"""Where the base model is. Light: no torch."""

import json
from pathlib import Path

from sft_pipeline.errors import InputError
from sft_pipeline.hub import local_folder
from sft_pipeline.training.config import ModelConfig

_FOLDER_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


def base_folder(config: ModelConfig) -> Path:
    """The folder of the base model: a local one, or the hub's at a pinned commit, fetched once into the hub's cache.

    Raises:
        InputError: There is no such folder and it is no hub id, the hub id has no pinned commit, or the hub cannot
            be reached.
    """
    files = (*_FOLDER_FILES, "*.py") if config.trust_remote_code else _FOLDER_FILES
    folder = local_folder(config.base, config.revision, key="model.base", patterns=files)
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
    return local_folder(config.tokenizer, config.revision, key="model.tokenizer", patterns=_FOLDER_FILES)


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

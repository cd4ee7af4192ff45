"""Nothing of this machine leaves it: paths are rewritten in copied manifests, and every exported file is searched."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from sft_pipeline.project import project_root, sft_home

WEIGHTS = ".safetensors"
UNSAFE = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npy",
    ".npz",
    ".joblib",
)
# Where any absolute path is a mistake. Vocabularies, samples and templates hold path-like text of their own; there, as
# everywhere, this machine's own folders count.
_SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
_ABSOLUTE = re.compile(
    rb"""(?<![\w.:/~<*-])/(?:home|root|Users|tmp|mnt|opt|srv|var|data|work|workspace|private|media|scratch)/[\w.@+-]+|\b[A-Za-z]:\\\\?\w"""
)


def portable(value: Any) -> Any:
    """A JSON value without machine paths: those below the project root become relative, others keep their name only."""
    if isinstance(value, dict):
        return {_portable_text(k): portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    return _portable_text(value) if isinstance(value, str) else value


def _portable_text(text: str) -> str:
    if re.fullmatch(r"(?:file:)?[/~][^\s]*", text) and len(text) > 1:
        path = PurePosixPath("/" + text.removeprefix("file:").lstrip("/~"))
        root = PurePosixPath(project_root().as_posix())
        return (
            path.relative_to(root).as_posix()
            if path.is_relative_to(root) and path != root
            else f"…/{path.name}"
        )
    for folder in machine_folders():
        text = text.replace(folder + "/", "")
    return text


def machine_folders() -> list[str]:
    """This machine's own folders: the project, SFT_HOME, the home folder, the interpreter's environment."""
    import sys

    found = {
        project_root().as_posix(),
        sft_home().as_posix(),
        os.path.expanduser("~"),
        Path(sys.prefix).as_posix(),
        Path.cwd().as_posix(),
    }
    return sorted((f.rstrip("/") for f in found if len(f) > 1), key=len, reverse=True)


def machine_paths(folder: Path) -> Iterator[dict[str, Any]]:
    """Every machine path in the files below `folder`: file, line and the text around it."""
    own = re.compile(b"|".join(re.escape(f.encode()) + rb"(?=[/\"'\s\\]|$)" for f in machine_folders()))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        data = safetensors_header(path) if path.suffix == WEIGHTS else path.read_bytes()
        patterns = [own, _ABSOLUTE] if path.name in _SETTINGS else [own]
        seen: set[int] = set()
        for match in (m for pattern in patterns for m in pattern.finditer(data)):
            line = data.count(b"\n", 0, match.start()) + 1
            if line not in seen:
                seen.add(line)
                around = data[max(0, match.start() - 40) : match.end() + 40]
                yield {"file": name, "line": line, "text": around.decode("utf-8", "replace")}


def safetensors_header(path: Path) -> bytes:
    """The JSON header of a safetensors file: tensor names, and whatever metadata was put beside them."""
    with path.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, 100_000_000))


def unsafe_files(folder: Path) -> list[str]:
    """Files that are, or may hold, weights in another format than safetensors."""
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.suffix.lower() in UNSAFE]

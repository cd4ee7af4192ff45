"""Texts that leave this machine, without its folders."""

import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from sft_pipeline.project import project_root, sft_home

_ABSENT = "…/"  # in the place of folders outside the project
_WHOLE_PATH = re.compile(r"(?:file:)?[/~][^\s]*")
_ABSOLUTE = re.compile(r"(?<![\w.…])(?:file:)?[/~]")


def portable(value: Any) -> Any:
    """A JSON value with paths relative to the project root; of paths elsewhere only the name stays."""
    if isinstance(value, dict):
        return {portable(k): portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    if not isinstance(value, str):
        return value
    if _WHOLE_PATH.fullmatch(value) and len(value) > 1:
        path = PurePosixPath("/" + value.removeprefix("file:").lstrip("/~"))
        root = PurePosixPath(project_root().as_posix())
        inside = path.is_relative_to(root) and path != root
        return path.relative_to(root).as_posix() if inside else f"{_ABSENT}{path.name}"
    for folder in machine_folders():
        value = value.replace(folder + "/", "")
    return value


def may_be_portable(text: str, shorter: str) -> bool:
    """Whether `portable` may have made `shorter` of `text`, on a machine whose folders are not known.

    It takes folders out of absolute paths and adds nothing, so what is left occurs in the text in the same
    order, and the last name stays.
    """
    if text == shorter:
        return True
    if not _ABSOLUTE.search(text):
        return False
    last_name = text.rpartition("/")[2].removeprefix("file:").lstrip("~")
    rest = iter(text)
    in_order = all(character in rest for character in shorter.replace(_ABSENT, ""))
    return in_order and shorter.endswith(last_name)


def machine_folders() -> list[str]:
    """This machine's own folders: the project, SFT_HOME, the home folder, the interpreter's environment."""
    found = {
        project_root().as_posix(),
        sft_home().as_posix(),
        os.path.expanduser("~"),
        Path(sys.prefix).as_posix(),
        Path.cwd().as_posix(),
    }
    return sorted((f.rstrip("/") for f in found if len(f) > 1), key=len, reverse=True)

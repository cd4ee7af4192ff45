"""Hugging Face hub ids: tells a local folder from a repository, and fetches pinned snapshots."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.project import project_path
from sft_pipeline.secret_text import redacted

_REPOSITORY = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubId:
    """A repository on the hub: "gpt2", "owner/name", or either with "@commit".

    Attributes:
        name: Without the revision.
        revision: A commit, branch or tag; None where the id has none.
    """

    name: str
    revision: str | None


def parse_hub_id(path_or_id: str) -> HubId | None:
    """The repository that a name means; None for an existing path, and for what cannot be a hub id."""
    name, _, revision = path_or_id.partition("@")
    if project_path(path_or_id).exists() or not _REPOSITORY.fullmatch(name):
        return None
    return HubId(name, revision or None)


def without_revision(path_or_id: str) -> str:
    """The name of a local path or of a hub id, without a hub id's "@revision"."""
    hub_id = parse_hub_id(path_or_id)
    return hub_id.name if hub_id else path_or_id


def local_folder(path_or_id: str, revision: str | None, *, key: str, patterns: Sequence[str]) -> Path:
    """A local folder as it is, or the files of a hub repository at a pinned revision, cached if possible.

    Args:
        revision: Counts for a hub id that names none itself.
        key: The recipe's key, for error messages.
        patterns: The files to fetch.

    Raises:
        InputError: There is no such folder and it is no hub id, no revision is pinned, or the hub cannot be
            reached.
    """
    folder = project_path(path_or_id)
    if folder.is_dir():
        return folder
    hub_id = parse_hub_id(path_or_id)
    if hub_id is None:
        raise InputError(
            f"{key} {path_or_id}: the folder {folder} does not exist, and this is no hub id (OWNER/NAME). "
            "Correct the path in the recipe"
        )
    commit = hub_id.revision or revision
    if not commit:
        raise InputError(
            f"{key} {path_or_id}: the folder {folder} does not exist; if this is a hub id, pin it to a "
            f"commit (model.revision: COMMIT, or {hub_id.name}@COMMIT)"
        )
    from huggingface_hub import snapshot_download

    files: dict[str, Any] = {"repo_id": hub_id.name, "revision": commit, "allow_patterns": list(patterns)}
    with contextlib.suppress(Exception):  # not in the cache, or not whole: fetch it
        return Path(snapshot_download(**files, local_files_only=True))
    try:
        return Path(snapshot_download(**files))
    except Exception as error:  # the hub's client raises many kinds, also those of its HTTP library
        first = redacted((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))
        raise InputError(
            f"{key} {hub_id.name}@{commit} cannot be loaded: {first}. Check the name, the pinned commit, "
            "HF_TOKEN and the network"
        ) from error


@contextlib.contextmanager
def clear_loading_errors(what: str) -> Iterator[None]:
    """Turns what libraries raise for a model that is absent, unreachable or unsafe into one message."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        first = redacted(str(error).strip().split("\n")[0].rstrip("."))
        raise InputError(
            f"{what} cannot be loaded: {first}. Check the name, the pinned commit, HF_TOKEN and the network, "
            "and that it has safetensors"
        ) from error

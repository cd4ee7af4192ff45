"""Which snapshots a dataset has, and the digests of the files or hub datasets that a snapshot is made of.

A source of the Hugging Face hub is `hf://dataset@revision?config=NAME&split=NAME`, where `dataset` may also
be a local folder of one. The revision is required: an artifact must be made of something that does not move.
A branch or tag is resolved to its commit when the fingerprint is taken.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file
from sft_pipeline.hub import HubId, parse_hub_id
from sft_pipeline.project import project_path
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.raw_rows.find import find_files, subfolders
from sft_pipeline.store.files import sha256_json
from sft_pipeline.store.partition_names import why_unusable

_COMMIT = re.compile(r"[0-9a-f]{40}")


def snapshots(
    sources: Sequence[RawSource], refused: Callable[[str], None] = lambda message: None
) -> list[str]:
    """The names of a dataset's snapshots, sorted: subfolders that every non-static source has.

    A dataset of static sources has the one snapshot `static-<digest12>`, named after its content.

    Args:
        refused: Told of each folder whose name no snapshot can have. It is left out, so that the others work.

    Raises:
        InputError: A source's folder does not exist.
    """
    moving = [s for s in sources if not _is_static(s)]
    if not moving:
        return [f"static-{sha256_json(sorted(_digests(sources, '').values()))[:12]}"]
    names = sorted(set.intersection(*(subfolders(s.path) for s in moving)))
    problems = {name: why for name in names if (why := why_unusable(name))}
    for name, why in problems.items():
        refused(
            f"{moving[0].path.rstrip('/')}: the folder {name!r} is left out, since its name {why}: rename it"
        )
    return [name for name in names if name not in problems]


def source_digests(sources: Sequence[RawSource], snapshot: str) -> dict[str, str]:
    """{file as the configuration gives it: sha256} for every source file of the snapshot.

    Keys are relative to the project root where the configured path is, so `project_path(key)` finds the file
    again; a hub dataset is one entry with its commit.

    Raises:
        InputError: Unknown snapshot, a missing path, no file of a known format, or one of an unknown format.
    """
    check_snapshot(sources, snapshot)
    return _digests(sources, snapshot)


def check_snapshot(sources: Sequence[RawSource], snapshot: str) -> None:
    """Raises:
    InputError: There is no such snapshot; the message names the newest ones.
    """
    if why := why_unusable(snapshot):
        raise InputError(f"no snapshot {snapshot!r}: the name {why}")
    known = snapshots(sources)
    if snapshot in known:
        return
    moving = [s.path for s in sources if not _is_static(s)]
    if not moving:
        raise InputError(
            f"no snapshot {snapshot}: the sources are static, and their content is the snapshot {known[0]}"
        )
    where = ", ".join(moving)
    if not known:
        shared = " that all sources share" if len(moving) > 1 else ""
        raise InputError(
            f"no snapshot {snapshot}: {where} has no subfolder{shared}. Put each snapshot's files into a "
            "subfolder of its own, or set `static: true` for files that do not change"
        )
    newest = ", ".join(known[-3:][::-1])
    raise InputError(f"no snapshot {snapshot}: there is no folder {snapshot} in {where}. Newest: {newest}")


def _digests(sources: Sequence[RawSource], snapshot: str) -> dict[str, str]:
    digests: dict[str, str] = {}
    for source in sources:
        if is_hub(source.path):
            digests |= hub_digests(source.path)
            continue
        found = find_files(source, snapshot)
        digests |= {f.given: f.digest() for f in (*found.files, *found.joined, *found.order)}
    return digests


def _is_static(source: RawSource) -> bool:
    """A hub dataset is pinned by its revision, so it is the same in every snapshot."""
    return source.static or is_hub(source.path)


# -- the Hugging Face hub --------------------------------------------------------------------------


@dataclass(frozen=True)
class HubDataset:
    """A dataset at a revision. `folder` is set where it is a folder on this machine."""

    name: str
    revision: str
    folder: Path | None
    config: str | None
    split: str | None


def is_hub(path: str) -> bool:
    """Whether a source's path is an address of the hub."""
    return path.startswith("hf://")


def parse_address(path: str) -> HubDataset:
    """The dataset of a hub address.

    Raises:
        InputError: No revision, or an unknown option.
    """
    address, _, query = path.removeprefix("hf://").partition("?")
    # What is no hub id is a local folder, whose path may hold an "@" itself.
    hub_id = parse_hub_id(address) or HubId(*address.rpartition("@")[::2])
    if not hub_id.name or not hub_id.revision:
        raise InputError(
            f"{path}: add the revision, as in hf://owner/dataset@COMMIT: a dataset that may change cannot be "
            "traced"
        )
    options = dict(parse_qsl(query))
    if unknown := sorted(options.keys() - {"config", "split"}):
        raise InputError(f"{path}: unknown option {unknown[0]}; known are config and split")
    path_here = project_path(hub_id.name)
    folder = path_here if path_here.is_dir() else None
    return HubDataset(hub_id.name, hub_id.revision, folder, options.get("config"), options.get("split"))


def files_of(dataset: HubDataset) -> dict[str, Path]:
    """{file as the configuration gives it: its path} for a dataset that is a folder on this machine."""
    folder = dataset.folder or Path()
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {
        f"{dataset.name.rstrip('/')}/{name.as_posix()}": folder / name
        for name in names
        if not any(part.startswith(".") for part in name.parts)
    }


def hub_digests(path: str) -> dict[str, str]:
    """{file: sha256} of a local folder, else {path: revision}; the hub's commit ids are content digests.

    Raises:
        InputError: A branch or tag that cannot be resolved now.
    """
    dataset = parse_address(path)
    if dataset.folder:
        return {given: digest_file(file) for given, file in files_of(dataset).items()}
    if _COMMIT.fullmatch(dataset.revision):
        return {path: f"commit:{dataset.revision}"}
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset.name, revision=dataset.revision).sha
    except Exception as error:  # whatever it is, the revision is not known now
        raise InputError(
            f"{path}: cannot resolve the revision {dataset.revision} ({error.__class__.__name__}); give the "
            "40-digit commit instead"
        ) from error
    return {path: f"commit:{commit}"}


def hub_names(path: str) -> set[str]:
    """The keys of `hub_digests`."""
    dataset = parse_address(path)
    return set(files_of(dataset)) if dataset.folder else {path}


def commit_of(path: str, recorded: Mapping[str, str]) -> str | None:
    """The commit that was recorded for a hub address; None for a local folder."""
    return recorded[path].removeprefix("commit:") if path in recorded else None


def check_hub_unchanged(path: str, recorded: Mapping[str, str]) -> None:
    """Raises:
    InputError: The address is a local folder, and a file of it is not as it was recorded.
    """
    for name, digest in hub_digests(path).items() if parse_address(path).folder else ():
        if recorded.get(name) != digest:
            raise InputError(
                f"{name} changed while it was read: run again when nothing writes to it any more"
            )

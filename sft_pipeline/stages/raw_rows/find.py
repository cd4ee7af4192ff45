"""Which files of a snapshot hold rows. No file is passed over without a word.

A file whose name has a readable ending is read. A file that is not data by one of the rules in `RULES` is
listed, with the rule, in the artifact's report. Any other file is an error that names it. Links are followed,
to files and to folders; a link that leads nowhere or back to where it came from is an error.

A folder that `datasets` wrote with `save_to_disk` is read as it would read it: the files that its state.json
names, in that order.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

from sft_pipeline.bounded import matching
from sft_pipeline.errors import InputError
from sft_pipeline.project import project_path
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.raw_rows.streams import FORMATS, SUPPORTED, SourceFile
from sft_pipeline.store.partition_names import why_unwritable

HIDDEN = "hidden: the name begins with a dot"
STATE, INFO = "state.json", "dataset_info.json"
METADATA = (STATE, INFO, "dataset_infos.json", "dataset_dict.json")
RULES = {
    "documentation": ("readme*", "license*", "licence*", "notice*", "*.md"),
    "a writer's mark": ("_success", "_ready", "_metadata", "_common_metadata", "*.lock"),
    "checksums": ("*.sha1", "*.sha256", "*.sha512", "*.md5", "*.crc", "sha*sums*", "md5sums*", "checksums*"),
}
"""What is not data, by the file's name in small letters, unless it has a readable ending."""

_MAGIC = re.compile(r"[*?\[]")


@dataclass
class Found:
    """What a source's snapshot consists of.

    Attributes:
        files: Those that hold rows, in the order in which they are read.
        joined: Those whose rows are joined to them.
        order: The state.json files that this order follows.
        not_data: {name of another file, or of a hidden folder: the rule by which it is not read}.
    """

    files: list[SourceFile] = field(default_factory=list)
    joined: list[SourceFile] = field(default_factory=list)
    order: list[SourceFile] = field(default_factory=list)
    not_data: dict[str, str] = field(default_factory=dict)


def find_files(source: RawSource, snapshot: str) -> Found:
    """The files of one source (not of the hub).

    Raises:
        InputError: The path does not exist, holds no file of a known format, or holds a file that is neither
            readable nor known not to be data.
    """
    found, join = _find_all(source, snapshot), source.join
    if source.files or (join and join.files):
        _choose_named(found, source)
    if join and join.path:
        found.joined = _find_all(RawSource(path=join.path, static=True), "").files
    return found


def _choose_named(found: Found, source: RawSource) -> None:
    """Leaves the files that `files` names, and puts those of the join apart.

    Raises:
        InputError: There is none.
    """
    theirs = source.join.files if source.join else None
    found.joined = [f for f in found.files if theirs and fnmatch(f.name, theirs)]
    named = source.files or "*"
    chosen = [f for f in found.files if f not in found.joined and fnmatch(f.name, named)]
    others = [f for f in found.files if f not in found.joined and f not in chosen]
    found.not_data |= {f.given: "not named by `files`" for f in others}
    for setting, pattern, files in (("files", named, chosen), ("join.files", theirs, found.joined)):
        if pattern and not files:
            names = ", ".join(f.name for f in found.files[:5])
            raise InputError(f"{source.path}: {setting} {pattern!r} names none of the files there ({names})")
    found.files = chosen


def _find_all(source: RawSource, snapshot: str) -> Found:
    """As `find_files`, whatever the files are named."""
    given = source.path if source.static else f"{source.path.rstrip('/')}/{snapshot}"
    fs, path = resolve(given)
    if fs.isfile(path):
        # A link may point to a file of another name, so what counts is the name that was given.
        name = PurePosixPath(given if _is_local(fs) else path).name
        if not name.lower().endswith(SUPPORTED):
            raise InputError(f"{given}: no reader for this file. Known formats: {FORMATS}")
        return Found([SourceFile(name, given, fs, path, int(fs.size(path) or 0))])
    if fs.isdir(path):
        root, given_root, paths = path, given.rstrip("/"), list(_walk(fs, path))
    elif is_glob(given):
        given_root = given[: _MAGIC.search(given).start()].rpartition("/")[0]  # type: ignore[union-attr]
        root = resolve(given_root or ".")[1]
        paths = list(_glob(fs, root, path))
    else:
        raise InputError(
            f"{given} does not exist ({path}). Check `path` in the dataset file; relative paths start at the "
            "folder of dagster.yaml"
        )
    found, unknown = Found(), []
    for each, problem in sorted(paths):
        name = each.removeprefix(root).lstrip("/")
        given_name = f"{given_root}/{name}" if given_root else name
        if why := why_unwritable(given_name):
            raise InputError(f"the name of the file {given_name!r} {why}: rename it")
        rule = problem if problem == HIDDEN else why_not_data(name)
        if rule:
            found.not_data[given_name] = rule
        elif problem:
            raise InputError(f"{given_name} {problem}")
        elif not name.lower().endswith(SUPPORTED):
            unknown.append(given_name)
            continue
        if not rule or name.rpartition("/")[2] == STATE:
            file = SourceFile(name, given_name, fs, each, int(fs.size(each) or 0))
            (found.order if rule else found.files).append(file)
    if unknown:
        more = f" and {len(unknown) - 3} more files" if len(unknown) > 3 else ""
        raise InputError(
            f"no reader for {', '.join(unknown[:3])}{more}: move what is not data out of the folder, or name "
            f"the files to read with a pattern, for example `path: {given.rstrip('/')}/*.jsonl`. Known "
            f"formats: {FORMATS}"
        )
    found.order = [state for state in found.order if _follow(state, found)]
    if not found.files:
        raise InputError(f"{given}: no file to read ({path}). Known formats: {FORMATS}")
    return found


def is_glob(path: str) -> bool:
    return bool(_MAGIC.search(path))


def why_not_data(name: str) -> str | None:
    """The rule by which a file of this name is not data, None where no rule applies."""
    last = name.rpartition("/")[2].lower()
    if last in METADATA:
        return "metadata of `datasets`"
    if last.endswith(SUPPORTED):
        return None
    return next((rule for rule, names in RULES.items() if any(fnmatch(last, n) for n in names)), None)


def _follow(state: SourceFile, found: Found) -> bool:
    """Puts the Arrow files beside a state.json of `save_to_disk` into its order; those it does not name, such
    as caches, are no data.

    Returns:
        Whether it is such a file.
    """
    folder = state.given.removesuffix(STATE)
    if f"{folder}{INFO}" not in found.not_data:
        return False
    with state.fs.open(state.path, "rb") as stream:
        try:
            names = [folder + part["filename"] for part in json.load(stream)["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{state.given}: not the state of a data set ({error!r}): save it again"
            ) from error
    beside = {
        f.given: f for f in found.files if PurePosixPath(f.given).parent == PurePosixPath(folder or ".")
    }
    if missing := [name for name in names if name not in beside]:
        raise InputError(f"{missing[0]} is missing, though {state.given} names it: copy the folder again")
    first = min((i for i, f in enumerate(found.files) if f.given in names), default=0)
    for given in beside:
        if given.endswith(".arrow") and given not in names:
            found.not_data[given] = f"not named by {STATE}"
    found.files = [f for f in found.files if f.given not in names and f.given not in found.not_data]
    found.files[first:first] = [beside[name] for name in names]
    return True


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, str]]:
    """(path of a file below the folder, "" or what hinders reading it); hidden folders are not entered."""
    if _is_local(fs):
        yield from _walk_here(folder, frozenset({os.path.realpath(folder)}))
        return
    for path in fs.find(folder):
        parts = path.removeprefix(folder).lstrip("/").split("/")
        yield path, HIDDEN if any(part.startswith(".") for part in parts) else ""


def _walk_here(folder: str, above: frozenset[str], depth: int | None = None) -> Iterator[tuple[str, str]]:
    """As `_walk`, on this machine, and through links.

    Args:
        above: The real paths of the folder and those around it.
        depth: How many levels of folders are looked at; None for all.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    for entry in entries:
        real = os.path.realpath(entry.path)
        if entry.name.startswith("."):
            yield entry.path + ("/" if os.path.isdir(real) else ""), HIDDEN
        elif real in above:
            yield entry.path, "is a link to a folder that it lies in: remove the link"
        elif os.path.isdir(real):
            if depth is None or depth > 1:
                yield from _walk_here(entry.path, above | {real}, depth and depth - 1)
        elif os.path.isfile(real):
            yield entry.path, ""
        elif entry.is_symlink():
            yield entry.path, "is a link that leads nowhere: remove it, or bring back what it points to"
        else:
            yield entry.path, "is neither a file nor a folder: move it out of the folder"


def _glob(fs: Any, root: str, pattern: str) -> Iterable[tuple[str, str]]:
    """As `_walk`, for the files that match the pattern (`*` within a name, `**` over folders)."""
    if not _is_local(fs):
        return [(path, "") for path in fs.glob(pattern) if fs.isfile(path)]
    from fsspec.utils import glob_translate

    depth = None if "**" in pattern else pattern.removeprefix(root).strip("/").count("/") + 1
    around = frozenset({os.path.realpath(root)})
    found = list(_walk_here(root, around, depth))
    matched = matching(
        "the pattern of a source's path", glob_translate(pattern), [path for path, _ in found], whole=True
    )
    return [(path, problem) for path, problem in found if path in matched]


def resolve(path: str) -> tuple[Any, str]:
    """The fsspec file system and the path in it.

    Raises:
        InputError: No file system for this address.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if "://" not in path:
        return LocalFileSystem(), str(project_path(path))
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"{path}: no file system for this address ({error})") from error


def subfolders(path: str) -> set[str]:
    """The names of the folders (and links to folders) in a folder, without hidden ones.

    Raises:
        InputError: There is no such folder, or a link in it leads nowhere.
    """
    fs, folder = resolve(path)
    if fs.isfile(folder) or is_glob(path):
        raise InputError(
            f"{path} is a file, not a folder with one subfolder per snapshot: set `static: true` for this "
            "source"
        )
    if not fs.isdir(folder):
        raise InputError(
            f"{path} does not exist ({folder}). Check `path` in the dataset file; relative paths start at "
            "the folder of dagster.yaml"
        )
    if not _is_local(fs):
        entries = fs.ls(folder, detail=True)
        names = {PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory"}
        return {name for name in names if not name.startswith(".")}
    with os.scandir(folder) as here:
        names = {entry.name for entry in here if not entry.name.startswith(".")}
    for name in names:
        if not os.path.exists(f"{folder}/{name}"):
            raise InputError(
                f"{path.rstrip('/')}/{name} is a link that leads nowhere: remove it, or bring back what it "
                "points to"
            )
    return {name for name in names if os.path.isdir(f"{folder}/{name}")}


def _is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)

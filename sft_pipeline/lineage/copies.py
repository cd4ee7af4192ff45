"""The manifests that an export carries in `lineage/`, compared with those in the store, field by field.

A copy names no folder of the machine it was made on: of an absolute path it keeps what follows the project's
folder, or only the name behind "…/". Nothing else may differ.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_pipeline.lineage.walk import LINEAGE_FOLDER, Chain, copied_manifests

# The folders of an absolute path, up to its last "/".
_FOLDERS = re.compile(r"(?<![\w.…/~])(?:file:)?[/~](?:[^\s/\"']+/)*")


def copy_problems(chain: Chain) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong) of every copy that differs, and of the index of copies."""
    copies = copied_manifests(chain.root)
    for node in chain.nodes:
        copy = copies.get(node.fingerprint)
        if copy is None or node.manifest_path is None or node.path is None or node.path == chain.root:
            continue
        stored, carried = (json.loads(path.read_bytes()) for path in (node.manifest_path, copy))
        if places := list(differences(stored, carried)):
            yield copy, f"differs from {node.manifest_path} in {', '.join(places[:5])}"
    yield from _index_problems(chain, copies)


def differences(stored: Any, carried: Any, place: str = "") -> Iterator[str]:
    """The dotted keys under which a copy differs from what it was made of, folders of a machine apart."""
    if isinstance(stored, dict) and isinstance(carried, dict):
        yield from _differences_of_mappings(stored, carried, place)
    elif isinstance(stored, list) and isinstance(carried, list) and len(stored) == len(carried):
        for number, (a, b) in enumerate(zip(stored, carried)):
            yield from differences(a, b, f"{place}{number}.")
    elif isinstance(stored, str) and isinstance(carried, str):
        if not may_be_copy(stored, carried):
            yield place[:-1]
    elif type(stored) is not type(carried) or stored != carried:
        yield place[:-1]


def _differences_of_mappings(stored: dict[str, Any], carried: dict[str, Any], place: str) -> Iterator[str]:
    """As `differences`. Two files of one name in different folders may have become one key of the copy."""
    by_name: dict[str, list[str]] = {}
    for key in stored:
        by_name.setdefault(key.rpartition("/")[2], []).append(key)
    copied: set[str] = set()
    for key, value in carried.items():
        same_name = by_name.get(key.rpartition("/")[2], [])
        originals = [key] if key in stored else [name for name in same_name if may_be_copy(name, key)]
        copied.update(originals)
        found = [list(differences(stored[name], value, f"{place}{key}.")) for name in originals]
        if not found:
            yield f"{place}{key}"
        elif all(found):
            yield from found[0]
    yield from (f"{place}{key}" for key in stored if key not in copied)


def may_be_copy(stored: str, carried: str) -> bool:
    """Whether two texts are equal but for leading folders of absolute paths that the second leaves out."""
    if stored == carried:
        return True
    pattern, end = "", 0
    for match in _FOLDERS.finditer(stored):
        folders = match.group().split("/")[1:]
        kept = ["/".join(folders[n:]) for n in range(len(folders))]  # each beginning left out; "" at the end
        choices = "|".join(re.escape(k) for k in (match.group(), *kept, "…/"))
        pattern += re.escape(stored[end : match.start()]) + f"(?:{choices})"
        end = match.end()
    return re.fullmatch(pattern + re.escape(stored[end:]), carried) is not None


def _index_problems(chain: Chain, copies: dict[str, Path]) -> Iterator[tuple[Path, str]]:
    """`chain.json` says of each copy what the copy says of itself."""
    path = chain.root / LINEAGE_FOLDER / "chain.json"
    if not path.is_file():
        return
    try:
        entries = json.loads(path.read_bytes())["chain"]
        listed = {entry["fingerprint"]: entry for entry in entries}
    except (ValueError, KeyError, TypeError):
        yield path, "not a readable index of the manifests beside it"
        return
    for fingerprint in sorted(listed.keys() ^ copies.keys()):
        yield path, f"{fingerprint[:12]} is in the index or beside it, but not in both"
    for fingerprint, entry in listed.items():
        copy = copies.get(fingerprint)
        if copy is None:
            continue
        carried = json.loads(copy.read_bytes())
        own = {name: carried[name] for name in ("asset", "partition", "data_version")} | {
            "manifest": copy.name,
            "inputs": {name: i["fingerprint"] for name, i in carried["inputs"].items()},
        }
        wrong = sorted(name for name, value in own.items() if entry.get(name) != value)
        if wrong:
            yield path, f"its entry of {copy.name} differs from that manifest in {', '.join(wrong)}"

"""The manifests that an export carries in `lineage/`, compared with those in the store, field by field.

A copy names no folder of the machine it was made on (`portable_paths.py`). Nothing else may differ.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_pipeline.lineage.walk import LINEAGE_FOLDER, Chain, copied_manifests
from sft_pipeline.portable_paths import may_be_portable, portable
from sft_pipeline.store.files import canonical_json


def copy_problems(chain: Chain) -> Iterator[tuple[Path, str]]:
    """(file, what is wrong) of every copy that differs, and of the index of copies."""
    copies = copied_manifests(chain.root)
    for node in chain.nodes:
        copy = copies.get(node.fingerprint)
        if copy is None or node.manifest_path is None or node.path is None or node.path == chain.root:
            continue
        stored, carried = (json.loads(path.read_bytes()) for path in (node.manifest_path, copy))
        if canonical_json(carried) == canonical_json(portable(stored)):
            continue
        if places := list(differences(stored, carried)):  # it may be of another machine
            yield (
                copy,
                f"differs from {node.manifest_path} in {', '.join(places[:5])}: one of them was changed, or "
                "that artifact was deleted and built again after the export",
            )
    of_chain = {node.fingerprint for node in chain.nodes}
    for fingerprint in sorted(copies.keys() - of_chain):
        yield copies[fingerprint], "no artifact of the chain was made from this one"
    yield from _index_problems(chain, copies)


def differences(stored: Any, carried: Any, place: str = "") -> Iterator[str]:
    """The dotted keys under which a copy differs from what it was made of, folders of a machine apart."""
    if isinstance(stored, dict) and isinstance(carried, dict):
        copied: set[str] = set()
        for key, value in carried.items():
            # Two files of one name in different folders have become one key of the copy.
            originals = [key] if key in stored else [name for name in stored if may_be_portable(name, key)]
            copied.update(originals)
            found = [list(differences(stored[name], value, f"{place}{key}.")) for name in originals]
            if all(found):
                yield from found[0] if found else (f"{place}{key}",)
        yield from (f"{place}{key}" for key in stored if key not in copied)
    elif isinstance(stored, list) and isinstance(carried, list) and len(stored) == len(carried):
        for number, (a, b) in enumerate(zip(stored, carried)):
            yield from differences(a, b, f"{place}{number}.")
    elif isinstance(stored, str) and isinstance(carried, str):
        if not may_be_portable(stored, carried):
            yield place[:-1]
    elif type(stored) is not type(carried) or stored != carried:
        yield place[:-1]


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
    for fingerprint in sorted(copies.keys() - listed.keys()):
        yield path, f"{copies[fingerprint].name} is beside the index, but not in it"
    files = {entry.path for entry in chain.nodes[0].manifest.files} if chain.nodes[0].manifest else set()
    for fingerprint in sorted(listed.keys() - copies.keys()):
        name = str(listed[fingerprint].get("manifest"))
        if f"{LINEAGE_FOLDER}/{name}" not in files:  # else it is that file that is missing or damaged
            yield path, f"its entry {name} ({fingerprint[:12]}) is of no file"
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

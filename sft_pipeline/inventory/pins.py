"""Pins: artifacts that `sft gc` keeps because somebody said so, one small file each."""

import json
from datetime import UTC, datetime

from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import write_json


def pinned(store: Store) -> list[str]:
    """The fingerprints that are pinned."""
    return sorted(path.stem for path in store.pins.glob("*.json"))


def pin(artifact: Artifact, store: Store) -> None:
    """Keeps an artifact, and all that it was made from, until it is unpinned.

    Raises:
        InputError: It is not in this store.
    """
    found = store.get(artifact.manifest.fingerprint)
    if found is None:
        raise InputError(
            f"{artifact.path} is not in the store {store.home}: only what is there can be pinned"
        )
    m = found.manifest
    with store.using() as use, use.steady():  # not while it is being collected
        if store.get(m.fingerprint) is None:
            raise InputError(f"{found.path} was removed a moment ago")
        about = {"asset": m.asset, "partition": m.partition, "pinned_at": datetime.now(UTC).isoformat()}
        write_json(store.pins / f"{m.fingerprint}.json", about)


def unpin(fingerprint: str, store: Store) -> str:
    """Removes the one pin that begins so; returns its fingerprint.

    Raises:
        InputError: There is no such pin, or more than one.
    """
    found = [name for name in pinned(store) if name.startswith(fingerprint)]
    if len(found) != 1:
        there = ", ".join(f"{name[:12]} ({about(name, store)})" for name in pinned(store)) or "none"
        raise InputError(f"--unpin {fingerprint}: {len(found)} pins begin like that. There are: {there}")
    (store.pins / f"{found[0]}.json").unlink(missing_ok=True)
    return found[0]


def about(fingerprint: str, store: Store) -> str:
    """`asset snapshot` of a pin."""
    try:
        value = json.loads((store.pins / f"{fingerprint}.json").read_bytes())
        return f"{value['asset']} {value['partition']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "unreadable"

"""MODEL on the command line: the folder of an export, a recipe's current model, or one of its snapshots."""

import os
import re
from pathlib import Path

from sft_pipeline.errors import InputError
from sft_pipeline.inventory.refs import StoredRef, current_refs
from sft_pipeline.store import Artifact, Store

EXPORT = "exported_model"
_FINGERPRINT = re.compile("[0-9a-f]{6,64}")
_SHOWN = 10


def find_model(text: str, store: Store) -> Artifact:
    """The exported model that is meant.

    Args:
        text: The folder of an export or one inside it (`merged`), the name of a recipe (its current model, of
            the newest snapshot by name), `recipe@snapshot`, or the beginning of a fingerprint (6 digits at
            least).

    Raises:
        InputError: There is none, or more than one; the message says which there are.
    """
    folder = Path(os.path.realpath(os.path.expanduser(text))) if text else None
    if folder and folder.is_dir():
        return _of_folder(folder, text)
    refs = [ref for ref in current_refs(store) if ref.asset.rpartition("/")[2] == EXPORT]
    recipe, _, snapshot = text.partition("@")
    named = [r for r in refs if r.asset == f"{recipe}/{EXPORT}" and snapshot in ("", r.partition)]
    if named:
        return _of_ref(max(named, key=lambda ref: ref.partition), store)
    if _FINGERPRINT.fullmatch(text):
        found = [a for a in store.all() if a.path.name.startswith(text) and _is_export(a)]
        if len(found) > 1:
            raise InputError(f"{text}: {len(found)} models begin like that: give more digits")
        if found:
            return found[0]
    raise InputError(f"no model {text!r}. {_known(refs)}")


def _of_folder(folder: Path, text: str) -> Artifact:
    for candidate in (folder, folder.parent):
        if (candidate / "manifest.json").is_file():
            artifact = Artifact(candidate)
            if not _is_export(artifact):
                raise InputError(f"{text}: an artifact of {artifact.manifest.asset}, not an exported model")
            return artifact
    raise InputError(f"{text}: no manifest.json in this folder, so it is no exported model")


def _of_ref(ref: StoredRef, store: Store) -> Artifact:
    artifact = store.get(ref.fingerprint) if ref.fingerprint else None
    if artifact is None:
        recipe = ref.asset.rpartition("/")[0]
        raise InputError(
            f"{ref.path} names a model that is not in the store: run `sft run {recipe} --snapshot "
            f"{ref.partition}` to have it made again"
        )
    return artifact


def _is_export(artifact: Artifact) -> bool:
    return artifact.manifest.asset.rpartition("/")[2] == EXPORT


def _known(refs: list[StoredRef]) -> str:
    if not refs:
        return "There is none yet: `sft run RECIPE` makes one"
    names = [f"{ref.asset.rpartition('/')[0]}@{ref.partition}" for ref in refs]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"There are {', '.join(names[:_SHOWN])}{more}; give the name of a recipe, recipe@snapshot, the "
        "beginning of a fingerprint of `sft list`, or the folder of an export"
    )

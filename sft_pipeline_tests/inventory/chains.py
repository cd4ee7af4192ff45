"""Stores with many small branches, as their stages would leave them: real artifacts without real models."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sft_pipeline.stages.graph import STAGES
from sft_pipeline.store import Artifact, Store
from sft_pipeline_tests.tracking.artifacts import put

SNAPSHOT = "s1"


def fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()


def chain(store: Store, number: int, recipe: str = "r", raw: Artifact | None = None) -> dict[str, Artifact]:
    """A branch of the nine stages; with the raw rows of another branch where they are given."""
    made: dict[str, Artifact] = {"raw_rows": raw} if raw else {}
    for name, stage in STAGES.items():
        if name in made:
            continue
        owner = "d" if stage.of_dataset else recipe
        inputs = {upstream: made[upstream] for upstream in (*stage.inputs, *stage.acceptance)}

        def write(folder: Path, name: str = name) -> None:
            (folder / "data.txt").write_text(f"{number} {name}" * 20)
            if name == "evaluation":
                result = {
                    "rank_by": ["right", "-val_loss"],
                    "base": {"right": 0.0},
                    "tuned": {"right": number / 100},
                }
                (folder / "evaluation.json").write_text(json.dumps(result))

        made[name] = put(store, f"{owner}/{name}", fingerprint(number, name), inputs, write, SNAPSHOT)
    return made


def add_alias(client: Any, export: Artifact, recipe: str, alias: str | None) -> None:
    """Registers an export as a version, and points an alias at it."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(recipe)
    except MlflowException as error:
        assert error.error_code == "RESOURCE_ALREADY_EXISTS"
    tags = {"sft.fingerprint": export.manifest.fingerprint, "sft.path": str(export.path)}
    version = client.create_model_version(recipe, source="runs:/0/exported_model", tags=tags)
    if alias:
        client.set_registered_model_alias(recipe, alias, version.version)


def names(*chains: dict[str, Artifact]) -> set[str]:
    """The fingerprints of whole branches."""
    return {artifact.path.name for made in chains for artifact in made.values()}


def stored(store: Store) -> set[str]:
    return {path.name for path in store.objects.iterdir()}


def contents(store: Store) -> dict[str, bytes]:
    """{path: bytes} of all that lies in objects/."""
    files = (p for p in sorted(store.objects.rglob("*")) if p.is_file())
    return {p.relative_to(store.objects).as_posix(): p.read_bytes() for p in files}

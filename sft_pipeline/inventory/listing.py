"""What there is: exported models, all artifacts, Dagster runs; as plain values."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.inventory.pins import pinned
from sft_pipeline.inventory.refs import current_refs
from sft_pipeline.store import Artifact, Manifest, Store
from sft_pipeline.store.manifest import MANIFEST_NAME

MOST_RUNS = 200
# `sft list` waits for a server no longer than this, unless the environment says otherwise.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def list_artifacts(store: Store, unreadable: Callable[[InputError], None]) -> list[dict[str, Any]]:
    """Every artifact, the newest first."""
    current, pins = {ref.fingerprint for ref in current_refs(store)}, set(pinned(store))
    return [_about(artifact, current, pins) for artifact in reversed(store.all(unreadable))]


def list_models(
    store: Store, unreadable: Callable[[InputError], None]
) -> tuple[list[dict[str, Any]], str | None]:
    """(every exported model, the newest first; why MLflow could not be asked for aliases).

    `rank_by` is the first term by which checkpoints were ranked, `base` and `tuned` are its values on the
    test split, `scores` all values there; null where the evaluation is not in the store. `aliases` is null
    where MLflow was not asked.
    """
    exports = [a for a in store.all(unreadable) if a.manifest.asset.endswith("/exported_model")]
    if not exports:
        return [], None
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from sft_pipeline.tracking.aliases import registry_aliases

    registry = registry_aliases(store)
    current, pins = {ref.fingerprint for ref in current_refs(store)}, set(pinned(store))
    items = []
    for artifact in reversed(exports):
        m = artifact.manifest
        known = registry.problem is None and m.fingerprint not in registry.elsewhere
        items.append(
            {
                "recipe": m.asset.rpartition("/")[0],
                **_about(artifact, current, pins),
                "step": m.counts.get("step"),
                **scores_of(artifact, store),
                "aliases": registry.names.get(m.fingerprint, []) if known else None,
            }
        )
    return items, registry.problem


def evaluation_of(manifest: Manifest, store: Store) -> Artifact | None:
    """The evaluation that chose an export; None where it is not in the store."""
    entry = manifest.inputs.get("evaluation")
    return store.get(entry.fingerprint) if entry else None


def scores_of(export: Artifact, store: Store) -> dict[str, Any]:
    """`rank_by`, `base`, `tuned` and `scores` as `list_models` gives them."""
    nothing: dict[str, Any] = {"rank_by": None, "base": None, "tuned": None, "scores": None}
    evaluation = evaluation_of(export.manifest, store)
    if evaluation is None:
        return nothing
    try:
        result = json.loads(evaluation.file("evaluation.json").read_bytes())
        base, tuned = result["base"], result["tuned"]
        terms = result.get("rank_by") or list(tuned)
    except (OSError, ValueError, LookupError):  # `sft fsck` names what is damaged
        return nothing
    # On the test split the loss is called test_loss.
    name = terms[0].lstrip("-").replace("val_loss", "test_loss")
    return {
        "rank_by": terms[0],
        "base": base.get(name),
        "tuned": tuned.get(name),
        "scores": {"base": base, "tuned": tuned},
    }


def list_runs() -> list[dict[str, Any]]:
    """The newest Dagster runs, `MOST_RUNS` at most, the newest first.

    `status` is Dagster's in small letters, or "lost" for a run that is recorded as going on though its
    process is gone. `seconds` is what it took, or has taken so far. `experiment` is true for a run with
    overrides.
    """
    from sft_pipeline.launch.reaper import is_running
    from sft_pipeline.orchestration.assets import SET_TAG
    from sft_pipeline.orchestration.instance import open_instance

    items = []
    with open_instance() as instance:
        for record in instance.get_run_records(limit=MOST_RUNS):
            run = record.dagster_run
            lost = not run.is_finished and not is_running(instance, run)
            end = record.end_time or (None if lost else datetime.now(UTC).timestamp())
            began = record.start_time or record.create_timestamp.timestamp()
            items.append(
                {
                    "id": run.run_id,
                    "job": run.job_name,
                    "recipe": _recipe(run),
                    "snapshot": run.tags.get("dagster/partition"),
                    "status": "lost" if lost else run.status.value.lower(),
                    "started_at": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
                    "seconds": round(end - began, 1) if end else None,
                    "experiment": run.tags.get(SET_TAG, "[]") != "[]",
                    "overrides": json.loads(run.tags.get(SET_TAG, "[]")),
                }
            )
    return items


def _recipe(run: Any) -> str | None:
    """By the job's name; by the assets where some were picked in the UI."""
    if run.job_name.endswith("_job"):
        return str(run.job_name).removesuffix("_job")
    owners = sorted({key.path[0] for key in run.asset_selection or ()})
    return ", ".join(owners) or None


def _about(artifact: Artifact, current: set[str | None], pins: set[str]) -> dict[str, Any]:
    m = artifact.manifest
    age = (datetime.now(UTC) - datetime.fromisoformat(m.created_at)).total_seconds()
    return {
        "asset": m.asset,
        "snapshot": m.partition,
        "fingerprint": m.fingerprint,
        "path": str(artifact.path),
        "bytes": sum(f.bytes for f in m.files) + (artifact.path / MANIFEST_NAME).stat().st_size,
        "created_at": m.created_at,
        "age_seconds": round(max(0.0, age)),
        "current": m.fingerprint in current,
        "accepted": m.accepted,
        "pinned": m.fingerprint in pins,
    }

"""What of the store is needed, and why: `sft gc` keeps exactly this.

refs, aliases, pins, running processes and runs, young artifacts     the reasons
    └─ inputs, and files of exports that were read as a base         all that these were made from
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sft_pipeline.config.load import config_folders
from sft_pipeline.errors import SftError
from sft_pipeline.inventory.pins import pinned
from sft_pipeline.inventory.refs import current_refs, run_ids, run_refs
from sft_pipeline.project import project_path
from sft_pipeline.store import Artifact, Manifest, Store

_FINGERPRINT = re.compile("[0-9a-f]{64}")
_TEMPORARY_RUN = re.compile("(look|sweep)-[0-9a-f]{32}")  # of a command, which removes its refs at its end


@dataclass(frozen=True)
class KeepRule:
    """What else is kept.

    Attributes:
        younger_than_days: Artifacts that were made later; 0 for none.
        last: So many of the newest exported models of each recipe.
    """

    younger_than_days: float = 0.0
    last: int = 0


@dataclass
class Needed:
    """The outcome.

    Attributes:
        why: {fingerprint: the first reason that was found}, with all that these were made from.
        notes: What a user should know of how it was decided.
        dead_runs: Runs of commands that were killed: nobody will ask for their refs.
    """

    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dead_runs: list[str] = field(default_factory=list)


def find_needed(
    store: Store, artifacts: Mapping[str, Artifact], rule: KeepRule, used: tuple[set[str], set[str]]
) -> Needed:
    """Decides with the lock of `collecting` held, so that nothing changes meanwhile.

    Args:
        artifacts: Everything in the store whose manifest can be read, by fingerprint.
        used: (fingerprints, beginnings of run ids) that running processes have noted.

    Raises:
        SftError: A ref, or the manifest of something needed, cannot be read: what it needs is unknown.
    """
    found = Needed()
    roots: dict[str, str] = {}
    for ref in current_refs(store):
        if ref.fingerprint is None:
            raise SftError(
                f"{ref.path}: this ref cannot be read, so what it keeps is unknown and nothing was removed. "
                "`sft fsck` says more; materialize the asset again, or delete the file"
            )
        roots.setdefault(ref.fingerprint, "current")
    _add_aliases(roots, store, artifacts, found)
    for fingerprint in pinned(store):
        roots.setdefault(fingerprint, "pinned")
    for fingerprint in used[0]:
        roots.setdefault(fingerprint, "in use")
    for run_id in _living_runs(store, used[1], found):
        for ref in run_refs(store, run_id):
            if ref.fingerprint:
                roots.setdefault(ref.fingerprint, "of a run that goes on")
    for fingerprint in _named_in_configuration():
        if fingerprint in artifacts:
            roots.setdefault(fingerprint, "named in a recipe or dataset file")
    for fingerprint, why in _kept_by_rule(artifacts, rule):
        roots.setdefault(fingerprint, why)
    _add_closure(roots, store, artifacts, found)
    return found


def _add_aliases(
    roots: dict[str, str], store: Store, artifacts: Mapping[str, Artifact], found: Needed
) -> None:
    from sft_pipeline.tracking.aliases import registry_aliases

    registry = registry_aliases(store)
    exports = [f for f, artifact in artifacts.items() if artifact.manifest.asset.endswith("/exported_model")]
    if registry.problem:
        found.notes.append(
            f"{registry.problem}. Which models have an alias is unknown: every exported model is kept, with "
            "all that it was made from"
        )
        roots.update({f: "MLflow could not be asked" for f in exports if f not in roots})
        return
    for fingerprint, names in registry.names.items():
        roots.setdefault(fingerprint, f"alias {', '.join(names)}")
    elsewhere = registry.elsewhere.intersection(exports)
    for fingerprint in elsewhere:
        roots.setdefault(fingerprint, "registered with another MLflow server")
    if elsewhere:
        found.notes.append(
            f"{len(elsewhere)} exported models are registered with another MLflow server than "
            "MLFLOW_TRACKING_URI names; they are kept, since its aliases are unknown"
        )


def _living_runs(store: Store, used: set[str], found: Needed) -> set[str]:
    """Runs whose later steps, or whose retry, will read what they made."""
    there = run_ids(store)
    living = {run_id for run_id in there if run_id.startswith(tuple(used))} if used else set()
    found.dead_runs = [r for r in there if r not in living and _TEMPORARY_RUN.match(r)]
    rest = [r for r in there if r not in living and r not in found.dead_runs]
    if not rest:
        return living
    try:
        return living | _of_dagster(set(rest))
    except Exception as error:
        found.notes.append(
            f"Dagster's records cannot be read ({type(error).__name__}: {error}): every run is taken for one "
            "that goes on, and what it made is kept"
        )
        return living | set(rest)


def _of_dagster(candidates: set[str]) -> set[str]:
    """Those of the runs that go on in Dagster, or that one retries which does."""
    from dagster import DagsterRunStatus, RunsFilter

    from sft_pipeline.launch.reaper import is_running
    from sft_pipeline.orchestration.instance import open_instance

    ended = (DagsterRunStatus.SUCCESS, DagsterRunStatus.CANCELED)
    wanted = [status for status in DagsterRunStatus if status not in ended]
    living: set[str] = set()
    with open_instance() as instance:
        for run in instance.get_runs(RunsFilter(statuses=wanted)):
            if is_running(instance, run):
                living.update(r for r in (run.run_id, run.parent_run_id, run.root_run_id) if r)
    return living & candidates


def _named_in_configuration() -> set[str]:
    """Fingerprints in recipe and dataset files, as of a base that is an export of this store."""
    found: set[str] = set()
    for folder in config_folders():
        for path in (*folder.glob("datasets/*.y*ml"), *folder.glob("recipes/*.y*ml")):
            try:
                found.update(_FINGERPRINT.findall(path.read_text(encoding="utf-8", errors="replace")))
            except OSError:
                continue  # nobody can train from it either
    return found


def _kept_by_rule(artifacts: Mapping[str, Artifact], rule: KeepRule) -> Iterator[tuple[str, str]]:
    newest_first = sorted(artifacts.items(), key=lambda item: item[1].manifest.created_at, reverse=True)
    kept: dict[str, int] = {}
    for fingerprint, artifact in newest_first if rule.last else ():
        recipe, _, stage = artifact.manifest.asset.rpartition("/")
        if stage == "exported_model" and kept.setdefault(recipe, 0) < rule.last:
            kept[recipe] += 1
            yield fingerprint, f"one of the last {rule.last} of its recipe"
    if rule.younger_than_days:
        oldest = datetime.now(UTC) - timedelta(days=rule.younger_than_days)
        for fingerprint, artifact in newest_first:
            if datetime.fromisoformat(artifact.manifest.created_at) > oldest:
                yield fingerprint, "younger than --older-than"


def _add_closure(
    roots: Mapping[str, str], store: Store, artifacts: Mapping[str, Artifact], found: Needed
) -> None:
    """The roots, and everything that these were made from."""
    objects = Path(os.path.realpath(store.objects))
    todo = list(roots.items())
    while todo:
        fingerprint, why = todo.pop(0)
        if fingerprint in found.why:
            continue
        artifact = artifacts.get(fingerprint)
        if artifact is None:
            if os.path.lexists(store.objects / fingerprint):
                raise SftError(
                    f"{store.objects / fingerprint} is needed ({why}), but its manifest cannot be read, so "
                    "what it was made from is unknown and nothing was removed. `sft fsck` says more"
                )
            continue  # it is not in the store, or not any more
        found.why[fingerprint] = why
        needs = made_from(artifact.manifest, objects)
        todo += [
            (needed, why if why.startswith("upstream of ") else f"upstream of {why}") for needed in needs
        ]


def made_from(manifest: Manifest, objects: Path) -> set[str]:
    """The artifacts that one was made from: its inputs, and exports whose files it read as a base.

    Args:
        objects: The store's folder of objects, without links.
    """
    found = {entry.fingerprint for entry in manifest.inputs.values()}
    for name in manifest.outside:
        if not name.startswith("hub:"):
            path = project_path(name)
            if path.is_relative_to(objects) and path != objects:
                found.add(path.relative_to(objects).parts[0])
    return found

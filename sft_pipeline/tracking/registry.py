"""The model registry: every accepted export is a version; the champion alias moves only to a better one."""

import contextlib
import json
from typing import Any

from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Artifact, Store

CHAMPION = "champion"


def register(
    client: Any, run_id: str, export: Artifact, branch: Branch, store: Store, move: bool = True
) -> str:
    """Registers an export; moves the champion alias if it beats the champion on shared test groups.

    Args:
        move: False for a run with overrides: the alias stays.

    Returns:
        What happened, in words.
    """
    name = branch.require_recipe().name
    manifest = export.manifest
    evaluation = manifest.inputs["evaluation"].fingerprint
    with contextlib.suppress(Exception):
        client.create_registered_model(name, description=branch.require_recipe().description)
    same = [
        v
        for v in client.search_model_versions(f"name='{name}'")
        if v.tags.get("sft.fingerprint") == manifest.fingerprint
    ]
    version = (
        same[0]
        if same
        else client.create_model_version(
            name,
            source=f"runs:/{run_id}/exported_model",
            run_id=run_id,
            tags={
                "sft.fingerprint": manifest.fingerprint,
                "sft.data_version": manifest.data_version,
                "sft.path": str(export.path),
                "sft.evaluation": evaluation,
                "sft.snapshot": manifest.partition,
            },
        )
    )
    moved, why = (
        _beats_champion(client, name, version, evaluation, branch, store)
        if move
        else (False, "a run with overrides moves no alias")
    )
    if moved:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    client.set_model_version_tag(name, version.version, "sft.champion_decision", why)
    return (
        f"registered {name} version {version.version}; champion {'moved to it' if moved else 'stays'}: {why}"
    )


def _beats_champion(
    client: Any, name: str, version: Any, evaluation: str, branch: Branch, store: Store
) -> tuple[bool, str]:
    champion = None
    with contextlib.suppress(Exception):
        champion = client.get_model_version_by_alias(name, CHAMPION)
    if champion is None:
        return True, "the first version"
    if str(champion.version) == str(version.version):
        return False, "it is the champion already"
    term = branch.require_recipe().evaluation.rank_by[0]
    theirs, ours = store.get(champion.tags.get("sft.evaluation", "")), store.get(evaluation)
    if theirs is None or ours is None:
        return (
            False,
            f"the evaluation of champion version {champion.version} is not in this store, "
            "so the two cannot be compared",
        )
    groups, old, new = compare_on_shared_groups(theirs, ours, term.lstrip("-"))
    if not groups:
        return False, f"it shares no test group with champion version {champion.version}"
    better = new < old if term.startswith("-") else new > old
    scores = f"{term.lstrip('-')} {new:.4f} against {old:.4f} of version {champion.version}"
    return better, f"{scores} on {groups} shared test groups"


def compare_on_shared_groups(old: Artifact, new: Artifact, name: str) -> tuple[int, float, float]:
    """(number of test groups that both evaluations judged, mean of the old winner, mean of the new one)."""
    first, second = _test_scores(old, name), _test_scores(new, name)
    shared = sorted(set(first) & set(second))
    if not shared:
        return 0, 0.0, 0.0

    def mean(scores: dict[str, list[float]]) -> float:
        values = [v for group in shared for v in scores[group]]
        return sum(values) / len(values)

    return len(shared), mean(first), mean(second)


def _test_scores(evaluation: Artifact, name: str) -> dict[str, list[float]]:
    import pyarrow.parquet as pq

    winner = str(json.loads(evaluation.file("evaluation.json").read_text())["chosen_step"])
    table = pq.read_table(evaluation.file("samples.parquet"))
    scores: dict[str, list[float]] = {}
    if name not in table.column_names:
        return scores
    for split, step, group, value in zip(
        *(table[c].to_pylist() for c in ("side", "step", "group", name)), strict=True
    ):
        if split == "test" and str(step) == winner and value is not None:
            scores.setdefault(group, []).append(float(value))
    return scores

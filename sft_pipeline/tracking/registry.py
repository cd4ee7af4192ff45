"""The model registry: every accepted export is a version; the champion alias moves only to a better one."""

import json
from typing import Any

from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Artifact, Store

CHAMPION = "champion"
READY_SECONDS = 10  # some servers make a version ready a little later; MLflow would wait for 5 minutes
# The error codes of an alias that is not set and of a model that does not exist.
NO_ALIAS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")


def register(
    client: Any, run_id: str, export: Artifact, branch: Branch, store: Store, move: bool = True
) -> str:
    """Registers an export; moves the champion alias if it beats the champion on shared test groups.

    An export that is registered already keeps its version, so that a second call is harmless.

    Args:
        move: False for a run with overrides: the alias stays.

    Returns:
        What happened, in words.
    """
    from mlflow.exceptions import MlflowException

    name = branch.require_recipe().name
    manifest = export.manifest
    evaluation = manifest.inputs["evaluation"].fingerprint
    try:
        client.create_registered_model(name, description=branch.require_recipe().description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
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
            await_creation_for=READY_SECONDS,
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
    from mlflow.exceptions import MlflowException

    try:
        champion = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:  # any other error, a locked database say, does not mean "no champion"
        if error.error_code not in NO_ALIAS:
            raise
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
    measured = _measure(term.lstrip("-"), theirs, ours, store)
    if isinstance(measured, str):
        return False, f"cannot be compared with champion version {champion.version}: {measured}"
    old, new, what, where = measured
    better = new < old if term.startswith("-") else new > old
    return better, f"{what} {new:.4f} against {old:.4f} of version {champion.version} on {where}"


def _measure(
    name: str, theirs: Artifact, ours: Artifact, store: Store
) -> tuple[float, float, str, str] | str:
    """(the champion's value, this version's, what was measured, on what), or why they cannot be compared."""
    if name == "val_loss":
        return _measure_loss(theirs, ours, store)
    first, second = _test_scores(theirs, name), _test_scores(ours, name)
    if first is None or second is None:
        return f"{'the champion' if first is None else 'this version'} has no scores of {name}"
    if _grader(theirs, name) != _grader(ours, name):
        return (
            f"the grader {name} is another than the one that judged it. Put the alias by hand in MLflow, or "
            "run the champion's recipe again with this grader"
        )
    shared = sorted(set(first) & set(second))
    if not shared:
        return "it shares no test group"
    old, new = (_mean([v for group in shared for v in scores[group]]) for scores in (first, second))
    return old, new, name, f"{len(shared)} shared test groups"


def _measure_loss(theirs: Artifact, ours: Artifact, store: Store) -> tuple[float, float, str, str] | str:
    """As `_measure`, of the loss per supervised token on the test rows that both have, as the same tokens."""
    import pyarrow.parquet as pq

    made = [_formatting(evaluation, store) for evaluation in (theirs, ours)]
    if None in made:
        return "the rows that one of them was judged on are no longer stored"
    if made[0] != made[1]:
        return "losses of another tokenizer, chat template or mask are no measure of each other"
    columns = ["row_id", "tuned", "weight"]
    found = []
    for evaluation in (theirs, ours):
        path = evaluation.file("test_losses.parquet")
        if not path.is_file():
            return "the evaluation of one of them has no test_losses.parquet; materialize it again"
        found.append({r["row_id"]: r for r in pq.read_table(path, columns=columns).to_pylist()})
    shared = sorted(found[0].keys() & found[1].keys())
    weight = sum(found[1][row_id]["weight"] for row_id in shared)
    if not weight:
        return "they share no test row"
    old, new = (sum(rows[row_id]["tuned"] for row_id in shared) / weight for rows in found)
    return old, new, "test_loss", f"{len(shared)} shared test rows"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _result(evaluation: Artifact) -> dict[str, Any]:
    return json.loads(evaluation.file("evaluation.json").read_text(encoding="utf-8"))


def _formatting(evaluation: Artifact, store: Store) -> dict[str, str] | None:
    """What turned rows into tokens and labels; None where they are not in the store any more."""
    tokenized = store.get(evaluation.manifest.inputs["tokenized_rows"].fingerprint)
    if tokenized is None:
        return None
    formatting = json.loads(tokenized.file("formatting.json").read_text(encoding="utf-8"))
    return {name: formatting[name] for name in ("template_sha256", "tokenizer_sha256", "mask_sha256")}


def _grader(evaluation: Artifact, name: str) -> tuple[Any, dict[str, str]]:
    """(the grader's configuration, the digests of the files that it is made of)."""
    manifest = evaluation.manifest
    graders = manifest.config.get("evaluation", {}).get("graders", [])
    config: dict[str, Any] = next((g for g in graders if g["name"] == name), {})
    module = str(config.get("callable", "")).partition(":")[0]
    schema = config.get("schema")
    files = {
        file: digest
        for file, digest in manifest.outside.items()
        if (module and (file.endswith(".py") or file == module)) or file == schema
    }
    return config, files


def _test_scores(evaluation: Artifact, name: str) -> dict[str, list[float]] | None:
    """The chosen checkpoint's scores by test group; None where no grader has this name."""
    import pyarrow.parquet as pq

    winner = str(_result(evaluation)["chosen_step"])
    table = pq.read_table(evaluation.file("samples.parquet"))
    if name not in table.column_names:
        return None
    scores: dict[str, list[float]] = {}
    for split, step, group, value in zip(
        *(table[c].to_pylist() for c in ("side", "step", "group", name)), strict=True
    ):
        if split == "test" and str(step) == winner and value is not None:
            scores.setdefault(group, []).append(float(value))
    return scores

"""Whether a run that was killed again and again is the run that was not."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from resuming.attempt import STAGE, branch, use_home
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import sha256_file
from sft_pipeline.training.shards import Plan, Shards

COUNTED = ("examples", "tokens", "supervised_tokens")
FROM_PLAN = ("examples", "tokens", "supervised")
CURVES = ("loss", "learning_rate", "grad_norm", "val_loss")


@dataclass(frozen=True)
class RunFinding:
    """One thing that must hold, whether it does, and what was found."""

    what: str
    holds: bool
    found: str


def compare(whole: Path, killed: Path, kind: str, rows: Path) -> list[RunFinding]:
    """Compares the stores of the undisturbed and the killed run."""
    return [
        *_weights(_artifact(whole, kind, rows), _artifact(killed, kind, rows)),
        *_rows(_artifact(killed, kind, rows), _artifact(killed, kind, rows, "packed_shards")),
        *_tracking(killed, kind, _artifact(killed, kind, rows)),
    ]


def _artifact(home: Path, kind: str, rows: Path, stage: str = STAGE) -> Artifact:
    use_home(home)
    the_branch = branch(kind, rows)
    found = Store(home).resolve(STAGES[stage].asset(the_branch), the_branch.snapshot, ())
    assert found is not None, f"{home} has no {stage}"
    return found


def _weights(whole: Artifact, killed: Artifact) -> Iterator[RunFinding]:
    def weights(artifact: Artifact) -> dict[str, str]:
        names = ("model.safetensors", "adapter_model.safetensors")
        return {
            str(p.relative_to(artifact.path)): sha256_file(p)
            for p in sorted(artifact.path.glob("checkpoint-*/*"))
            if p.name in names
        }

    one, two = weights(whole), weights(killed)
    same = one == two
    last = max(one, key=lambda p: int(p.partition("/")[0].rpartition("-")[2]))
    yield RunFinding(
        "the weights are bit-identical",
        same,
        f"{', '.join(p.partition('/')[0] for p in one)}; SHA-256 of the last {one[last][:12]}"
        + ("" if same else f" undisturbed, {two.get(last, 'none')[:12]} killed ({', '.join(two)})"),
    )
    a, b = whole.manifest.data_version, killed.manifest.data_version
    different = {f.path: f.sha256 for f in whole.manifest.files if not f.volatile}.items() ^ {
        f.path: f.sha256 for f in killed.manifest.files if not f.volatile
    }.items()
    yield RunFinding(
        "the whole artifact is: optimizer, random states, curves",
        a == b,
        f"data version {a[:12]}"
        if a == b
        else f"different: {', '.join(sorted({path for path, _ in different}))}",
    )


def _rows(killed: Artifact, packed: Artifact) -> Iterator[RunFinding]:
    """What each update held, as it was recorded, against the plan; then the plan against the rows."""
    plan, shards = Plan(packed.file("plan.parquet")), Shards(packed.parts("train"))
    history = pq.read_table(killed.file("history.parquet")).to_pylist()
    recorded = {name: [(r["step"], r["value"]) for r in history if r["name"] == name] for name in COUNTED}
    steps = [step for step, _ in recorded["examples"]]
    yield RunFinding(
        "every update was made once, in order",
        steps == list(range(1, len(plan) + 1)),
        f"{len(steps)} updates recorded, {len(plan)} planned",
    )
    table = pq.read_table(packed.file("plan.parquet"))
    planned = {
        name: table.group_by("update").aggregate([(name, "sum")]).sort_by("update")[f"{name}_sum"].to_pylist()
        for name in FROM_PLAN
    }
    wrong = sum(
        [value for _, value in recorded[a]][i : i + 1] != [float(planned[b][i])]
        for a, b in zip(COUNTED, FROM_PLAN)
        for i in range(len(plan))
    )
    yield RunFinding(
        "each held the examples, tokens and supervised tokens of its blocks",
        wrong == 0,
        f"{wrong} of {3 * len(plan)} counts differ",
    )
    times = Counter(row for step in steps for b in plan.blocks(step - 1) for row in shards.row_ids(int(b)))
    rows = [row for block in range(len(shards)) for row in shards.row_ids(block)]
    epochs = set(times.values())
    yield RunFinding(
        "no row was trained twice in an epoch or skipped",
        sorted(times) == sorted(rows) and len(epochs) == 1,
        f"{len(times)} of {len(rows)} rows, each {'/'.join(map(str, sorted(epochs)))} times",
    )


def _tracking(home: Path, kind: str, killed: Artifact) -> Iterator[RunFinding]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(f"kills_{kind}")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    own = killed.manifest.mlflow_run_id
    yield RunFinding(
        "MLflow has one run",
        [r.info.run_id for r in runs] == [own] and runs[0].info.status == "FINISHED",
        f"{len(runs)} run, {runs[0].info.status}, the manifest's: {runs[0].info.run_id == own}",
    )
    history = pq.read_table(killed.file("history.parquet")).to_pylist()
    for name in CURVES:
        true = [(r["step"], r["value"]) for r in history if r["name"] == name]
        points = sorted(client.get_metric_history(own, name), key=lambda m: (m.timestamp, m.step))
        logged = [(m.step, m.value) for m in points]
        yield RunFinding(f"its curve of {name} is continuous", logged == true, _gaps(true, logged))


def _gaps(true: list[tuple[int, float]], logged: list[tuple[int, float]]) -> str:
    steps = Counter(step for step, _ in logged)
    missing = [step for step, _ in true if step not in steps]
    twice = [step for step, count in steps.items() if count > 1]
    other = sorted({step for step, value in set(logged) - set(true)})
    message = [f"{len(logged)} points of {len(true)}"]
    message += [f"missing: {missing}"] if missing else []
    message += [f"more than once: {twice}"] if twice else []
    message += [f"of another value: {other}"] if other else []
    return "; ".join(message)

"""A real sweep on a small dataset: interrupted, resumed, with a trial that diverges."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sft_pipeline.cli.branch import find_branch
from sft_pipeline.launch.launcher import run_isolated
from sft_pipeline.project import set_environment
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.stage import Build, Built, Stage
from sft_pipeline.store import Store
from sft_pipeline.sweep.grid import parse_grid
from sft_pipeline.sweep.plan import SweepPlan, planned
from sft_pipeline.sweep.run import Sweep, run_sweep
from sft_pipeline_tests.command import ROOT, sft

RATES = "training.learning_rate=1e-3,1e-2,1e30"
RECIPE = {
    "name": "small_lora",
    "dataset": "small",
    "extends": "lora",
    "model": {"base": "data/base_model", "lora": {"r": 4, "alpha": 8, "dropout": 0}},
    "tokens": {"max_length": 96},
    "training": {"epochs": 3, "per_device_batch": 2},
    "evaluation": {
        "graders": [
            {"name": "says_number", "kind": "regex", "pattern": "number"},
            {"name": "exact", "kind": "exact_match"},
        ],
        "gates": ["says_number >= 0.5"],
        "rank_by": ["exact", "-val_loss"],
        "max_new_tokens": 8,
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A dataset and a recipe, and an SFT_HOME of this module's own."""
    root = tmp_path_factory.mktemp("sweep")
    rows = [
        {
            "thread_id": f"T{i}",
            "prompt": f"Say the number {i} {'again ' * (i % 4)}",
            "completion": f"The number is {i}.",
        }
        for i in range(60)
    ]
    for path, text in {
        "rows/s1/rows.jsonl": "".join(json.dumps(r) + "\n" for r in rows),
        "datasets/small.yaml": yaml.safe_dump(
            {
                "name": "small",
                "sources": [{"path": str(root / "rows"), "columns": {"group": "thread_id"}}],
                "split": {"near_duplicates": None},
            }
        ),
        "recipes/small_lora.yaml": yaml.safe_dump(RECIPE),
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DAGSTER_HOME", "SFT_DAGSTER_DIR", "MLFLOW_TRACKING_URI"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setenv("SFT_HOME", str(root / "home"))
        patch.setenv("SFT_PROJECT_ROOT", str(ROOT))
        patch.setenv("SFT_CONFIG_PATH", str(root))
        set_environment()
        yield root


@contextmanager
def plan(*options: str, updates: int | None = None, report: Reporter | None = None) -> Iterator[SweepPlan]:
    grid = parse_grid(options)
    catalog, branch = find_branch("small_lora", None, grid.common, Console(file=io.StringIO()))
    with planned(catalog, branch, "small_lora", grid, updates, Store(), report or Reporter()) as found:
        yield found


class StopsInSecondTrial(Reporter):
    """Interrupts the training of the second trial."""

    trial = 0

    def log(self, message: str, level: str = "info") -> None:
        self.trial += message.startswith("trial ") and " of " in message

    def metrics(self, values: Any, step: int) -> None:
        if self.trial == 2 and step == 3:
            raise KeyboardInterrupt


def judged_in_child(stage: Stage, build: Build) -> Built:
    return run_isolated(stage, build) if stage.name == "trial_judgement" else stage.load_build()(build)


@dataclass
class Swept:
    stopped: Sweep
    sweep: Sweep
    refs: list[str]


@pytest.fixture(scope="module")
def swept(project: Path) -> Swept:
    """A sweep of three trials that was interrupted in the second, and run again.

    Where nothing hangs on it, stages run in this process, since every child spends seconds on its imports.
    """
    with plan(RATES, updates=6) as found:
        stopped = run_sweep(found, StopsInSecondTrial(), lambda _: None)
    with plan(RATES, updates=6) as found:
        again = run_sweep(found, Reporter(), lambda trial: judged_in_child if trial.number == 2 else None)
    refs = Store().refs
    return Swept(stopped, again, [str(p.relative_to(refs)) for p in refs.rglob("*") if p.is_file()])


def trial(sweep: Sweep, number: int) -> dict[str, Any]:
    return sweep.to_json()["points"][number - 1]


def test_an_interrupted_sweep_says_so_and_goes_on_where_it_was(swept: Swept) -> None:
    assert (swept.stopped.status, swept.stopped.exit_code) == ("interrupted", 4)
    assert [r.end.status for r in swept.stopped.results.values()] == ["judged", "pending", "pending"]
    assert (swept.sweep.status, swept.sweep.exit_code) == ("done", 0)
    assert [r.cached for r in swept.sweep.results.values()] == [True, False, False]
    assert swept.sweep.mlflow_run_id == swept.stopped.mlflow_run_id
    assert trial(swept.sweep, 1)["mlflow_run_id"] == trial(swept.stopped, 1)["mlflow_run_id"]
    assert trial(swept.sweep, 1)["metrics"] == trial(swept.stopped, 1)["metrics"]


def test_budgets_are_equal_and_the_schedules_complete(swept: Swept) -> None:
    trained = [trial(swept.sweep, n) for n in (1, 2)]
    budget = swept.sweep.plan.budget.supervised
    assert [p["supervised_tokens"] for p in trained] == [budget, budget] and budget > 0
    assert [p["updates"] for p in trained] == [6, 6]
    training = json.loads(Path(trained[0]["artifacts"]["trial_training"], "training.json").read_text())
    assert training["updates"] == {"planned": 6, "done": 6}
    assert training["per_update"]["supervised_tokens"]["mean"] == pytest.approx(budget / 6, abs=0.01)


def test_the_trial_that_diverges_is_last_and_says_why(swept: Swept) -> None:
    last = trial(swept.sweep, 3)
    assert (last["status"], last["rank"], last["gates_passed"]) == ("diverged", 3, None)
    assert last["verdict"] == "diverged: the loss of update 2 is nan"


def test_the_ranking_follows_the_rule(swept: Swept) -> None:
    first, second = sorted((trial(swept.sweep, n) for n in (1, 2)), key=lambda p: p["rank"])

    def key(p: dict[str, Any]) -> tuple[bool, float, float]:
        return (not p["gates_passed"], -p["metrics"]["exact"], p["metrics"]["val_loss"])

    assert key(first) <= key(second)
    for p in (first, second):
        assert p["gates_passed"] == (p["metrics"]["says_number"] >= 0.5)
        assert p["validation_rows"]["generated"] == p["validation_rows"]["rows"] > 0
    best = swept.sweep.to_json()["best"]
    assert best["point"] == first["point"]
    assert best["recipe_lines"] == [
        f"training: {{learning_rate: {'0.001' if first['point'] == 1 else '0.01'}}}"
    ]


def test_runs_are_nested_in_mlflow_with_their_curves(swept: Swept) -> None:
    from sft_pipeline.tracking.server import connect

    client, parent = connect(), swept.sweep.mlflow_run_id
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], filter_string=f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {r.info.run_id for r in children} == {trial(swept.sweep, n)["mlflow_run_id"] for n in (1, 2, 3)}
    by_id = {r.info.run_id: r for r in children}
    for number, status in ((1, "FINISHED"), (2, "FINISHED"), (3, "FAILED")):
        run = by_id[trial(swept.sweep, number)["mlflow_run_id"]]
        assert run.info.status == status and run.data.metrics["rank"] == trial(swept.sweep, number)["rank"]
    one = trial(swept.sweep, 2)
    assert [m.step for m in client.get_metric_history(one["mlflow_run_id"], "loss")] == list(range(1, 7))
    assert by_id[one["mlflow_run_id"]].data.metrics["validation/val_loss"] == one["metrics"]["val_loss"]
    assert client.get_run(parent).info.status == "FINISHED"
    assert client.get_run(parent).data.params["varied.training.learning_rate"] == "0.001, 0.01, 1e+30"
    assert {a.path for a in client.list_artifacts(parent)} == {"sweep.json", "curves.png", "ranking.png"}


def test_what_is_written_is_what_is_returned_and_no_ref_has_moved(swept: Swept) -> None:
    folder = swept.sweep.folder
    assert sorted(p.name for p in folder.iterdir()) == ["curves.png", "ranking.png", "sweep.json"]
    assert json.loads((folder / "sweep.json").read_text()) == json.loads(json.dumps(swept.sweep.to_json()))
    assert swept.refs == []
    stages = {a.manifest.asset.rpartition("/")[2] for a in Store().all()}
    assert (
        "trained_checkpoints" not in stages and {"trial_probe", "trial_training", "trial_judgement"} <= stages
    )


def test_the_test_split_is_not_read(swept: Swept) -> None:
    import pyarrow.parquet as pq

    samples = Path(trial(swept.sweep, 1)["artifacts"]["trial_judgement"], "samples.parquet")
    assert set(pq.read_table(samples)["side"].to_pylist()) == {"validation"}


def test_trials_with_other_updates_get_the_same_tokens(project: Path) -> None:
    with plan("training.blocks_per_update=2,4", updates=8) as found:
        two, four = found.trials
        assert (two.updates, four.updates) == (8, 4)
        assert abs(two.supervised - four.supervised) < four.supervised / four.updates
        assert two.branch.require_recipe().training.max_steps == 8
    assert not list((Store().refs / ".runs").glob("*"))


def test_a_trial_whose_data_is_blocked_does_not_stop_the_others(project: Path) -> None:
    with plan("tokens.max_length=96,8", updates=4) as found:
        fine, bad = found.trials
        assert fine.blocked is None and bad.blocked
    assert not found.trials[1].updates


def test_no_trial_trains_on_a_failed_probe(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_pipeline.stages.sanity_check import build

    monkeypatch.setattr(build, "changed_formatting", lambda *_: ["the template has changed"])
    with plan("training.learning_rate=1e-3,2e-3", "training.seed=7", updates=4) as found:
        sweep = run_sweep(found, Reporter(), lambda _: None)
    assert (sweep.status, sweep.exit_code, sweep.best()) == ("blocked", 3, None)
    assert "labels_match: the template has changed" in sweep.error
    made = {a.manifest.asset for a in Store().all() if a.manifest.config.get("training", {}).get("seed") == 7}
    assert made == {"small_lora/trial_probe"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "training.learning_rte=1e-4,1e-5"], "learning_rate"),
        (["--set", "training.learning_rate=1e-4,fast"], "training.learning_rate=fast"),
        (["--set", "training.max_steps=4,5"], "--updates N"),
    ],
)
def test_bad_input_is_one_message_before_anything_runs(
    project: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    ran = sft("sweep", "small_lora", *arguments, "--json", home=tmp_path / "home", config=project)
    assert ran.code == 2 and ran.json["status"] == "failed"
    assert words in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "home" / "sweeps").exists()

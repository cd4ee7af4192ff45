"""`sft gc` removes what it says and nothing else, whatever else goes on and wherever it is killed."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.errors import SftError
from sft_pipeline.inventory.collect import Collection, collect
from sft_pipeline.inventory.needed import KeepRule
from sft_pipeline.inventory.pins import pin
from sft_pipeline.lineage.verify import verify
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.files import locked, write_json
from sft_pipeline_tests.command import sft
from sft_pipeline_tests.inventory.chains import add_alias, chain, contents, names, stored
from sft_pipeline_tests.stages.test_run import BRANCH, graph, stage
from sft_pipeline_tests.tracking.artifacts import put


def gc(store: Store, *, dry_run: bool = False, **rule: Any) -> Collection:
    return collect(store, KeepRule(**rule), dry_run=dry_run, report=Reporter())


def removed(collection: Collection) -> set[str]:
    return {folder.fingerprint for folder in collection.removed if folder.kind == "artifact"}


def exports_verify(store: Store) -> int:
    """How many exported models there are; each of them is verified, and lacks nothing upstream."""
    exports = [a for a in store.all() if a.manifest.asset.endswith("/exported_model")]
    for export in exports:
        found = verify(export.path, store)
        assert found.verified, found.findings
        assert not [text for text in found.unreachable if "not in the store" in text]
    return len(exports)


def spawn(function: Any, *arguments: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


@pytest.fixture
def many(home: Path, client: Any) -> tuple[Store, set[str]]:
    """200 artifacts in 23 branches: three have an alias, one is current, one pinned; and what to keep."""
    store = Store()
    first = chain(store, 0)
    # Every second branch shares the raw rows of the first: 9 + 11 * 8 + 11 * 9 = 196, and 4 alone.
    branches = [first, *(chain(store, n, raw=first["raw_rows"] if n % 2 else None) for n in range(1, 23))]
    for number in range(4):
        put(store, f"lone/{number}", f"{number:064x}", {})
    assert len(stored(store)) == 200
    for artifact in branches[22].values():
        store.set_ref(artifact, run_id="ended", current=True)
    for number, alias in ((3, "champion"), (8, "candidate"), (11, "shadow"), (14, None)):
        add_alias(client, branches[number]["exported_model"], "r", alias)
    pin(branches[5]["exported_model"], store)
    return store, names(*(branches[n] for n in (3, 5, 8, 11, 22)))


def test_it_removes_what_it_says_and_nothing_else(many: tuple[Store, set[str]]) -> None:
    store, needed = many
    before = contents(store)
    said = gc(store, dry_run=True)
    assert contents(store) == before, "a dry run changes nothing"
    done = gc(store)
    assert removed(said) == removed(done) == {path.split("/")[0] for path in before} - needed
    assert contents(store) == {path: data for path, data in before.items() if path.split("/")[0] in needed}
    gone = sum(len(data) for path, data in before.items() if path.split("/")[0] not in needed)
    assert said.bytes == done.bytes == gone
    assert exports_verify(store) == 5
    assert list(store.trash.iterdir()) == []
    assert gc(store).removed == []


def test_the_command_says_what_and_how_much(many: tuple[Store, set[str]], home: Path) -> None:
    store, needed = many
    size = {
        path.name: sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        for path in store.objects.iterdir()
    }
    dry = sft("gc", "--dry-run", "--json", home=home)
    assert dry.code == 0 and dry.json["dry_run"] and len(stored(store)) == 200
    ran = sft("gc", "--json", home=home)
    assert ran.code == 0
    assert ran.json["removed"] == dry.json["removed"]
    assert {r["fingerprint"] for r in ran.json["removed"]} == size.keys() - needed
    assert ran.json["bytes"] == sum(size[name] for name in size.keys() - needed)
    assert stored(store) == needed


def test_without_mlflow_no_export_goes_nor_what_it_needs(
    many: tuple[Store, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = many
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = gc(store)
    assert removed(done) == {f"{number:064x}" for number in range(4)}
    assert exports_verify(store) == 23
    assert "127.0.0.1:9" in done.notes[0]


def test_a_registry_that_is_gone_or_another_keeps_what_was_registered(home: Path, client: Any) -> None:
    store = Store()
    branches = [chain(store, n) for n in range(2)]
    note = store.home / "registered" / f"{branches[0]['exported_model'].path.name}.json"
    write_json(note, {"tracking_uri": "https://elsewhere", "current": True, "outcome": "registered"})
    assert removed(gc(store)) == names(branches[1])
    assert stored(store) == names(branches[0])
    (home / "mlflow.db").unlink()
    assert removed(gc(store)) == set() and not (home / "mlflow.db").exists()
    write_json(note, {"tracking_uri": f"sqlite:///{home / 'mlflow.db'}", "current": True, "outcome": ""})
    assert "is gone" in gc(store).notes[0] and stored(store) == names(branches[0])


def _die_after(home: str, what: str, count: int) -> None:
    """Collects, and dies after so many calls of a function of this package."""
    from unittest import mock

    store, calls = Store(Path(home)), []
    target = {
        "discard": "sft_pipeline.store.Store.discard",
        "delete": "sft_pipeline.inventory.collect.remove_tree",
    }
    original = {"discard": Store.discard, "delete": __import__("shutil").rmtree}[what]

    def dying(*arguments: Any) -> Any:
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(arguments)
        return original(*arguments)

    with mock.patch(target[what], dying):
        gc(store)


@pytest.mark.parametrize(("what", "count"), [("discard", 0), ("discard", 7), ("discard", 60), ("delete", 3)])
def test_killed_in_the_middle(many: tuple[Store, set[str]], what: str, count: int) -> None:
    store, needed = many
    before = contents(store)
    process = spawn(_die_after, str(store.home), what, count)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    whole = {name for name in stored(store) if store.get(name).damage(deep=True) == []}
    assert stored(store) == whole >= needed
    assert {p: d for p, d in before.items() if p.split("/")[0] in whole} == contents(store)
    assert exports_verify(store) >= 5
    gc(store)
    assert stored(store) == needed and list(store.trash.iterdir()) == []


def _build_until_told(home: str, started: str, go: str) -> None:
    """Builds the stage `last` from what the run r1 made."""

    def build(build: Build) -> Built:
        Path(started).touch()
        while not Path(go).exists():
            time.sleep(0.01)
        (build.out / "value.txt").write_text(build.inputs["first"].file("value.txt").read_text() + "!")
        return Built({"rows": 1})

    first = graph()["first"]
    last = replace(stage("last", inputs=("first",)), load_build=lambda: build)
    run = Run(Store(Path(home)), Reporter(), run_id="r1", current=False)
    run_stage(last, {"first": first, "last": last}, BRANCH, run)


def test_what_a_running_build_reads_is_kept(home: Path, tmp_path: Path) -> None:
    store, started, go = Store(), tmp_path / "started", tmp_path / "go"
    first = graph()["first"]
    read = run_stage(
        first, {"first": first}, BRANCH, Run(store, Reporter(), run_id="r1", current=False)
    ).artifact
    other = chain(store, 1)
    process = spawn(_build_until_told, str(home), str(started), str(go))
    while not started.exists():
        assert process.is_alive()
        time.sleep(0.01)
    done = gc(store)
    assert removed(done) == names(other) and done.kept["in use"] == 1
    assert store.staging.joinpath(os.listdir(store.staging)[0]).is_dir()
    go.touch()
    process.join(60)
    assert process.exitcode == 0
    [built] = [a for a in store.all() if a.manifest.asset.endswith("/last")]
    assert built.damage(deep=True) == []
    assert removed(gc(store)) == {built.path.name, read.path.name}, "nobody needs an ended run's"


def test_no_process_begins_to_use_anything_while_it_is_decided(home: Path) -> None:
    store = Store()
    chain(store, 1)

    def planned(collection: Collection) -> None:
        with pytest.raises(TimeoutError), locked(store.locks / "collect.lock", shared=True, wait_seconds=0):
            pass

    assert collect(store, KeepRule(), dry_run=False, report=Reporter(), planned=planned).removed
    with locked(store.locks / "collect.lock", shared=True, wait_seconds=0):
        pass


def _build_without_saying(home: str, started: str, go: str) -> None:
    with Store(Path(home)).building("e" * 64):
        Path(started).touch()
        while not Path(go).exists():
            time.sleep(0.01)


def test_a_build_that_does_not_say_what_it_reads_stops_the_collection(home: Path, tmp_path: Path) -> None:
    store, started, go = Store(), tmp_path / "started", tmp_path / "go"
    made = chain(store, 1)
    process = spawn(_build_without_saying, str(home), str(started), str(go))
    while not started.exists():
        time.sleep(0.01)
    done = gc(store)
    assert done.removed == [] and "eeeeeeeeeeee" in done.notes[0] and stored(store) == names(made)
    go.touch()
    process.join(60)
    assert removed(gc(store)) == names(made)


def test_a_dagster_run_that_goes_on_keeps_what_it_made_and_what_it_retries(home: Path) -> None:
    from dagster import DagsterRun, DagsterRunStatus

    from sft_pipeline.launch.reaper import WORKER_TAG, process_identity
    from sft_pipeline.orchestration.instance import open_instance

    store = Store()
    going, parent, lost, done = (chain(store, n) for n in range(4))
    runs = {"going": going, "parent": parent, "lost": lost, "done": done}
    for run_id, made in runs.items():
        for artifact in made.values():
            store.set_ref(artifact, run_id=run_id, current=False)
    dead = process_identity().rsplit(":", 2)[0] + ":1:1"
    with open_instance() as instance:
        for run_id, status, worker, of in (
            ("parent", DagsterRunStatus.FAILURE, dead, None),
            ("going", DagsterRunStatus.STARTED, process_identity(), "parent"),
            ("lost", DagsterRunStatus.STARTED, dead, None),
            ("done", DagsterRunStatus.SUCCESS, dead, None),
        ):
            run = DagsterRun(
                job_name="r_job",
                run_id=run_id,
                status=status,
                tags={WORKER_TAG: worker},
                parent_run_id=of,
                root_run_id=of,
            )
            instance.add_run(run)
    assert removed(gc(store)) == names(lost, done)
    assert stored(store) == names(going, parent)
    assert (store.refs / ".runs" / "done").is_dir(), "who executes it again is told what is gone"


def test_work_of_finished_builds_goes_and_a_training_that_can_go_on_stays(home: Path) -> None:
    store = Store()
    made = chain(store, 1)
    for artifact in made.values():
        store.set_ref(artifact, run_id=None, current=True)
    training = made["trained_checkpoints"]
    finished = store.work(training.path.name) / "checkpoint-2"
    finished.mkdir(parents=True)
    os.link(training.file("data.txt"), finished / "adapter.safetensors")  # as `keep_checkpoints` links them
    (finished.parent / "child.log").write_text("x" * 1000)
    unfinished = store.work("a" * 64) / "checkpoint-2"
    unfinished.mkdir(parents=True)
    (unfinished / "optimizer.safetensors").write_text("y" * 50)
    scratch = store.work("b" * 64) / "spool"
    scratch.mkdir(parents=True)
    before = contents(store)
    done = gc(store)
    assert {f.fingerprint: f.bytes for f in done.removed} == {training.path.name: 1000, "b" * 64: 0}
    assert done.bytes == 1000, "what also lies in the artifact frees nothing"
    assert done.unfinished == [(unfinished.parent, 50)] and unfinished.is_dir()
    assert contents(store) == before and training.damage(deep=True) == []
    week_ago = time.time() - 8 * 86_400
    os.utime(unfinished, (week_ago, week_ago))
    assert gc(store, younger_than_days=9).unfinished
    assert [f.fingerprint for f in gc(store, younger_than_days=7).removed] == ["a" * 64]
    assert not unfinished.exists()


def test_young_artifacts_and_the_last_models_are_kept_on_demand(home: Path) -> None:
    store = Store()
    branches = [chain(store, n, recipe) for n, recipe in enumerate(["r", "r", "r", "other"])]
    assert gc(store, younger_than_days=1).removed == []
    assert removed(gc(store, last=1)) == names(branches[0], branches[1])
    assert exports_verify(store) == 2


def test_a_base_that_is_an_export_of_this_store_is_kept(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    store = Store()
    base, other = chain(store, 1), chain(store, 2)
    model = base["exported_model"].file("data.txt")
    with store.building("c" * 64) as folder:
        (folder / "a.txt").write_text("a")
        fields: dict[str, Any] = {
            **{"asset": "q/trained_checkpoints", "partition": "s1", "code_version": "c", "config": {}},
            **{
                "accepted": True,
                "counts": {},
                "environment": {},
                "inputs": {},
                "outside": {str(model): "0" * 64},
            },
        }
        tuned = store.commit(folder, volatile=(), fields=fields)
    store.set_ref(tuned, run_id=None, current=True)
    assert removed(gc(store)) == names(other)
    assert stored(store) == names(base) | {tuned.path.name}
    # A recipe that is yet to be run names it too.
    (store.refs / "q" / "trained_checkpoints" / "s1.json").unlink()
    recipes = tmp_path / "config" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "next.yaml").write_text(f"name: next\nmodel: {{base: {base['exported_model'].path}/merged}}\n")
    monkeypatch.setenv("SFT_CONFIG_PATH", str(tmp_path / "config"))
    assert removed(gc(store)) == {tuned.path.name}


@pytest.mark.parametrize("broken", ["ref", "manifest"])
def test_where_it_is_unknown_what_is_needed_nothing_is_removed(home: Path, broken: str) -> None:
    store = Store()
    current, other = chain(store, 1), chain(store, 2)
    for artifact in current.values():
        store.set_ref(artifact, run_id=None, current=True)
    path = {
        "ref": store.refs / "r/evaluation/s1.json",
        "manifest": current["evaluation"].file("manifest.json"),
    }
    path[broken].write_text("{")
    with pytest.raises(SftError, match="nothing was removed"):
        gc(store)
    assert stored(store) == names(current, other)


def test_an_unneeded_artifact_that_cannot_be_read_is_left_and_named(home: Path) -> None:
    store = Store()
    made = chain(store, 1)
    made["evaluation"].file("manifest.json").write_text("{")
    done = gc(store)
    assert stored(store) == {made["evaluation"].path.name}
    assert "sft fsck" in done.notes[0]


def test_refs_of_killed_commands_are_swept(home: Path) -> None:
    store = Store()
    made: list[Artifact] = []
    for number, run_id in enumerate((f"look-{'0' * 32}", f"sweep-{'1' * 32}-data-0")):
        made.append(put(store, f"a/{number}", f"{number:064x}", {}))
        store.set_ref(made[-1], run_id=run_id, current=False)
    with store.using() as use:
        with use.steady():
            use.add(runs=[f"sweep-{'1' * 32}"])
        assert removed(gc(store)) == {made[0].path.name}
        assert os.listdir(store.refs / ".runs") == [f"sweep-{'1' * 32}-data-0"]
    assert removed(gc(store)) == {made[1].path.name}
    assert os.listdir(store.refs / ".runs") == []


def test_pins_by_fingerprint_and_by_name(home: Path) -> None:
    store = Store()
    branches = [chain(store, n) for n in range(3)]
    store.set_ref(branches[0]["exported_model"], run_id=None, current=True)
    short = branches[1]["exported_model"].path.name[:12]
    ran = sft("gc", "--pin", short, "--pin", "r@s1", "--json", home=home)
    assert ran.code == 0 and ran.json["removed"] == [] and len(ran.json["pinned"]) == 2
    assert removed(gc(store)) == names(branches[2])
    assert sft("gc", "--unpin", "abcdef", "--json", home=home).code == 2
    assert sft("gc", "--unpin", short, "--json", home=home).json["unpinned"][0].startswith(short)
    assert removed(gc(store)) == names(branches[1])
    assert json.loads((store.refs / "r/exported_model/s1.json").read_text())["fingerprint"] in stored(store)

"""An isolated stage: its reports arrive, its errors are the parent's, and it never outlives the parent."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from sft_pipeline.errors import BlockedError, InputError, Interrupted, SftError
from sft_pipeline.launch import processes
from sft_pipeline.launch.launcher import run_isolated
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.stage import Build, Built, Check, Evidence, Stage
from sft_pipeline.store import Artifact
from sft_pipeline_tests.launch import builds
from sft_pipeline_tests.launch.builds import Inner, Toy
from sft_pipeline_tests.launch.helpers import clean_up, pids_in, running, wait_until

pytestmark = pytest.mark.skipif(not processes.LINUX, reason="supervision of whole trees is for Linux")
STAGE = Stage("toy", "a toy", frozenset(), (), lambda _: Toy(), builds.load_build, ())


class Kept(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def log(self, message, level="info"):
        self.events.append(("log", message, level))

    def progress(self, name, done, total, unit):
        self.events.append(("progress", name, done, total, unit))

    def metrics(self, values, step):
        self.events.append(("metrics", dict(values), step))

    def samples(self, rows, step):
        self.events.append(("samples", [dict(r) for r in rows], step))


def a_build(tmp_path: Path, do: str, **more) -> Build:
    first = tmp_path / "first"
    for folder in (first, tmp_path / "out"):
        folder.mkdir(exist_ok=True)
    (first / "value.txt").write_text("one ")
    config = Toy(do=do, inner=Inner(rate=0.25), folder=str(tmp_path))
    return Build(
        config,
        {"first": Artifact(first)},
        tmp_path / "out",
        tmp_path / "work",
        Kept(),
        snapshot="s1",
        asset="r/toy",
        **more,
    )


def test_builds_in_another_process_and_forwards_what_it_reports(tmp_path: Path):
    build = a_build(tmp_path, "build")
    (build.out / "of an earlier child").write_text("")
    built = run_isolated(STAGE, build)
    assert built == Built(
        {"rows": 7},
        (Check("good", True, "fine", {"rows": Evidence("table", [{"a": 1, "b": "x"}])}),),
        ("log/",),
        {"rate": Evidence("number", 0.5), "n": Evidence("number", 3)},
    )
    assert (build.out / "out.txt").read_text() == "one 0.25"
    events = build.report.events
    assert events[0] == ("log", "doing build in r/toy of s1", "info")
    assert ("progress", "steps", 3, 3, "steps") in events
    assert [h for h in events if h[0] == "metrics"] == [
        ("metrics", {"loss": 1.0 / (s + 1)}, s) for s in range(3)
    ]
    assert events[-1] == ("samples", [{"prompt": "p", "reply": "r", "expected": "e"}], 2)
    assert sorted(p.name for p in build.work.iterdir()) == [".lock", "child.log"]


def test_the_child_runs_its_exit_functions(tmp_path: Path):
    assert run_isolated(STAGE, a_build(tmp_path, "register_exit_function")).counts == {"rows": 1}
    assert (tmp_path / "exit functions").read_text()


@pytest.mark.parametrize(
    ("do", "kind", "words"),
    [
        ("input_error", InputError, ["r/toy: rows.jsonl:3: no completion. Give one"]),
        ("blocked", BlockedError, ["not accepted"]),
        ("crash", SftError, ["KeyError: 'surprise'", "about to crash", "child.log"]),
        (
            "memory",
            SftError,
            ["out of memory (cannot get 12 GiB)", "per_device_batch", "gradient_checkpointing"],
        ),
        ("disk_full", InputError, ["no space left on the disk while building r/toy"]),
        ("sigkill", SftError, ["SIGKILL", "out of memory", "resumes"]),
    ],
)
def test_an_error_of_the_child_is_raised_here(
    tmp_path: Path, do: str, kind: type[SftError], words: list[str]
):
    with pytest.raises(SftError) as caught:
        run_isolated(STAGE, a_build(tmp_path, do))
    assert type(caught.value) is kind
    assert all(w in str(caught.value) for w in words), str(caught.value)
    if kind is not SftError:
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_that_is_asked_to_stop_is_an_interruption(tmp_path: Path, number: signal.Signals):
    build = a_build(tmp_path, "wait")
    threading.Thread(
        target=lambda: os.kill(int(pids_in(tmp_path / "pids", 1)[0].split(":")[0]), number), daemon=True
    ).start()
    with pytest.raises(Interrupted, match="asked to stop"):
        run_isolated(STAGE, build)


class Interrupting(Kept):
    """Raises a BaseException in the launcher as soon as the child is up, as Dagster's termination does."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__()
        self.folder, self.count, self.tree = folder, count, []

    def log(self, message, level="info"):
        self.tree = pids_in(self.folder / "pids", self.count)
        raise KeyboardInterrupt


@pytest.mark.parametrize("supervisor_hangs", [False, True])
def test_an_interruption_here_ends_a_hung_child_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supervisor_hangs: bool
):
    reporter = Interrupting(tmp_path, 2)
    if supervisor_hangs:
        monkeypatch.setattr("sft_pipeline.launch.launcher.HARD_STOP_SECONDS", 0.5)
        monkeypatch.setattr(
            "sft_pipeline.launch.launcher.send",
            lambda pid, *signals: os.kill(pid, signals[0]) if signals == (signal.SIGKILL,) else None,
        )
    try:
        with pytest.raises(KeyboardInterrupt):
            run_isolated(STAGE, replace(a_build(tmp_path, "hang"), report=reporter))
        assert not running(reporter.tree)
    finally:
        clean_up(reporter.tree)


def test_stops_when_a_watched_process_is_gone(tmp_path: Path):
    watched = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    build = a_build(tmp_path, "hang")
    try:
        tree: list[str] = []
        threading.Thread(
            target=lambda: (tree.extend(pids_in(tmp_path / "pids", 2)), watched.kill()), daemon=True
        ).start()
        with pytest.raises(Interrupted, match="stopped from outside"):
            run_isolated(STAGE, build, watch=[str(watched.pid)])
        assert len(tree) == 2 and not running(tree)
    finally:
        watched.kill()
        watched.wait()
    with pytest.raises(Interrupted, match="is gone"):
        run_isolated(STAGE, build, watch=[str(watched.pid)])


PARENT = """
import sys
from pathlib import Path
from sft_pipeline_tests.launch.test_launcher import STAGE, a_build
from sft_pipeline.launch.launcher import run_isolated
folder, do, ranks = sys.argv[1:]
run_isolated(STAGE, a_build(Path(folder), do), processes=int(ranks))
"""


def test_a_killed_launcher_leaves_nothing_and_a_retry_waits_for_that(tmp_path: Path):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), "hang", "1"], start_new_session=True
    )
    tree = pids_in(tmp_path / "pids", 2)
    try:
        parent.kill()
        parent.wait()
        build = a_build(tmp_path, "build")
        # Its build function asserts that `out` is empty.
        assert run_isolated(STAGE, build).counts == {"rows": 7}
        assert not running(tree)
        assert any("waiting for the earlier process" in h[1] for h in build.report.events)
        # The dead launcher's files too are gone.
        assert sorted(p.name for p in build.work.iterdir()) == [".lock", "child.log"]
    finally:
        clean_up(tree)


def test_a_killed_supervisor_is_an_error_and_leaves_nothing(tmp_path: Path):
    build = a_build(tmp_path, "hang")
    tree: list[str] = []

    def kill() -> None:
        tree.extend(pids_in(tmp_path / "pids", 2))
        os.kill(processes.ancestors(int(tree[0].split(":")[0]))[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(SftError, match="supervisor of the child process was killed by SIGKILL"):
        run_isolated(STAGE, build)
    assert len(tree) == 2 and not running(tree)


def test_inside_dagster_the_child_speaks_pipes(tmp_path: Path):
    import dagster as dg

    @dg.asset
    def toy(context: dg.AssetExecutionContext):
        with dg.open_pipes_session(
            context, dg.PipesTempFileContextInjector(), dg.PipesTempFileMessageReader()
        ) as session:
            built = run_isolated(
                STAGE, a_build(tmp_path, "build"), extra_env=session.get_bootstrap_env_vars()
            )
        yield dg.MaterializeResult(metadata=dict(built.counts))

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([toy], instance=instance)
        assert result.success
        messages = [e.user_message for e in instance.all_logs(result.run_id)]
    assert any(m.startswith("r/toy is being built by process ") for m in messages), messages


class TestRanks:
    """Under torchrun, whose ranks live in sessions of their own."""

    def test_both_work_and_rank_0_answers(self, tmp_path: Path):
        assert run_isolated(STAGE, a_build(tmp_path, "ranks"), processes=2).counts == {"world": 2, "rank": 0}

    def test_the_error_is_that_of_the_rank_that_failed(self, tmp_path: Path):
        with pytest.raises(InputError, match="only the second rank saw it"):
            run_isolated(STAGE, a_build(tmp_path, "second_rank_fails"), processes=2)

    def test_a_killed_rank_is_named(self, tmp_path: Path):
        with pytest.raises(SftError, match="SIGKILL"):
            run_isolated(STAGE, a_build(tmp_path, "second_rank_killed"), processes=2)

    @pytest.mark.parametrize("victim", ["launcher", "supervisor"])
    def test_hung_ranks_die_with(self, tmp_path: Path, victim: str):
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(tmp_path), "ranks_hang", "2"],
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        ranks = pids_in(tmp_path / "pids", 2, seconds=60)
        torchrun, supervisor = processes.ancestors(processes.parse(ranks[0])[0])[:2]
        tree = [*ranks, processes.token(torchrun), processes.token(supervisor)]
        try:
            os.kill(parent.pid if victim == "launcher" else supervisor, signal.SIGKILL)
            wait_until(lambda: not running(tree))
        finally:
            parent.kill()
            parent.wait()
            clean_up(tree)

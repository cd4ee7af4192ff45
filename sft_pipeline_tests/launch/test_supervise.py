"""The supervisor leaves no process behind, however its end comes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sft_pipeline.launch import processes
from sft_pipeline.launch.supervise import EXIT_CANNOT_START, EXIT_LOCKED, EXIT_STOPPED, EXIT_WATCHED_GONE
from sft_pipeline_tests.launch.helpers import (
    clean_up,
    pids_in,
    running,
    start_hanging_tree,
    supervised,
    wait_until,
)

pytestmark = pytest.mark.skipif(not processes.LINUX, reason="supervision of whole trees is for Linux")
PYTHON = (sys.executable, "-S", "-c")


def test_passes_the_exit_status_on(tmp_path: Path):
    for code, expected in (
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ):
        with supervised(tmp_path, *PYTHON, code) as supervisor:
            assert supervisor.wait(20) == expected
    with supervised(tmp_path, "/no/such/program") as supervisor:
        assert supervisor.wait(20) == EXIT_CANNOT_START


def test_sigterm_ends_a_hung_tree_in_sessions_of_its_own(tmp_path: Path):
    with supervised(tmp_path, *start_hanging_tree(tmp_path)) as supervisor:
        tree = pids_in(tmp_path / "pids", 4)
        try:
            supervisor.send_signal(signal.SIGTERM)
            wait_until(lambda: not running(tree))
            assert supervisor.wait(20) == EXIT_STOPPED
        finally:
            clean_up(tree)


def test_a_process_that_obeys_is_not_waited_for(tmp_path: Path):
    with supervised(
        tmp_path,
        *PYTHON,
        f"import time; open({str(tmp_path / 'up')!r}, 'w'); time.sleep(60)",
        options=("--grace", "3600"),
    ) as supervisor:
        wait_until((tmp_path / "up").exists)
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(20) == EXIT_STOPPED


def test_when_a_watched_process_is_killed_the_tree_goes(tmp_path: Path):
    watched = subprocess.Popen([*PYTHON, "import time; time.sleep(60)"])
    with supervised(
        tmp_path,
        *start_hanging_tree(tmp_path),
        options=("--watch", processes.token(watched.pid), "--grace", "0.3"),
    ) as supervisor:
        tree = pids_in(tmp_path / "pids", 4)
        try:
            watched.kill()  # and not reaped: a zombie is gone too
            wait_until(lambda: not running(tree))
            assert supervisor.wait(20) == EXIT_WATCHED_GONE
        finally:
            clean_up(tree)
            watched.wait()


def test_a_recycled_pid_is_not_the_watched_process(tmp_path: Path):
    other = f"{os.getpid()}:{processes.parse(processes.token())[1] - 1}"
    with supervised(
        tmp_path, *PYTHON, "import time; time.sleep(60)", options=("--watch", other)
    ) as supervisor:
        assert supervisor.wait(20) == EXIT_WATCHED_GONE


def test_what_the_command_leaves_behind_is_ended(tmp_path: Path):
    tree, pids = start_hanging_tree(tmp_path), tmp_path / "pids"
    leaving = (
        f"import os, subprocess, time; subprocess.Popen({tree!r}, start_new_session=True)\n"
        f"while not (os.path.exists({str(pids)!r}) and open({str(pids)!r}).read().count('\\n') == 4):\n"
        "    time.sleep(0.02)\n"
        "raise SystemExit(5)"
    )
    with supervised(tmp_path, *PYTHON, leaving, options=("--grace", "0.3")) as supervisor:
        pids = pids_in(tmp_path / "pids", 4)
        try:
            assert supervisor.wait(20) == 5
            assert not running(pids)
        finally:
            clean_up(pids)


def test_a_killed_supervisor_takes_its_command_along_and_the_next_one_clears_the_rest(tmp_path: Path):
    with supervised(tmp_path, *start_hanging_tree(tmp_path)) as supervisor:
        tree = pids_in(tmp_path / "pids", 4)
        try:
            supervisor.kill()
            supervisor.wait()
            wait_until(lambda: tree[0] not in running(tree))  # the command itself, though deaf to SIGTERM
            count = (
                "from sft_pipeline.launch import processes; "
                f"raise SystemExit(sum(map(processes.is_running, {tree})))"
            )
            with supervised(tmp_path, sys.executable, "-c", count) as following:
                assert following.wait(20) == 0  # when the next command started, none of the four was left
                assert "an earlier supervisor left behind" in following.stderr.read()
        finally:
            clean_up(tree)


def test_the_lock_makes_a_second_command_wait(tmp_path: Path):
    events = tmp_path / "events"
    with supervised(tmp_path, *start_hanging_tree(tmp_path), options=("--grace", "0.5")) as first:
        tree = pids_in(tmp_path / "pids", 4)
        try:
            with supervised(
                tmp_path, *PYTHON, "raise SystemExit(0)", options=("--events", str(events))
            ) as second:
                wait_until(
                    lambda: events.exists() and "waiting for the earlier process" in events.read_text()
                )
                assert second.poll() is None
                with supervised(
                    tmp_path, *PYTHON, "raise SystemExit(0)", options=("--lock-wait", "0.3")
                ) as third:
                    assert third.wait(20) == EXIT_LOCKED
                    assert f"held by process {processes.token(first.pid)}" in third.stderr.read()
                first.terminate()
                assert second.wait(20) == 0
                assert not running(tree)
        finally:
            clean_up(tree)


def test_one_that_waits_for_the_lock_can_be_stopped(tmp_path: Path):
    with supervised(
        tmp_path, *PYTHON, f"import time; open({str(tmp_path / 'up')!r}, 'w'); time.sleep(60)"
    ) as first:
        wait_until((tmp_path / "up").exists)
        with supervised(
            tmp_path, *PYTHON, "raise SystemExit(0)", options=("--events", str(tmp_path / "events"))
        ) as second:
            wait_until((tmp_path / "events").exists)  # it waits
            second.terminate()
            assert second.wait(20) == EXIT_STOPPED
        assert first.poll() is None


def test_starts_without_the_heavy_libraries():
    code = (
        "import sys, sft_pipeline.launch.supervise; "
        "print(sorted({'torch', 'dagster', 'mlflow', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_without_proc_the_process_group_is_ended(tmp_path: Path):
    pids = str(tmp_path / "pids")
    script = f"import os, time; os.fork(); open({pids!r}, 'a').write('%d\\n' % os.getpid()); time.sleep(60)"
    elsewhere = (
        "import sys; from sft_pipeline.launch import processes, supervise; "
        "processes.LINUX = False; sys.exit(supervise.main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        elsewhere,
        "--lock",
        str(tmp_path / ".lock"),
        "--watch",
        f"{os.getpid()}:0",
        "--",
        *PYTHON,
        script,
    ]
    supervisor = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    group = pids_in(tmp_path / "pids", 2)
    try:
        supervisor.terminate()
        assert supervisor.wait(20) == EXIT_STOPPED
        wait_until(lambda: not running(group))
    finally:
        supervisor.kill()
        supervisor.wait()
        clean_up(group)


def test_descendants_are_found_whatever_the_name_of_the_process(tmp_path: Path):
    odd = tmp_path / "a) (b 1 2"
    odd.symlink_to("/bin/sleep")
    child = subprocess.Popen([str(odd), "60"])
    try:
        assert child.pid in processes.descendants(os.getpid())
        assert os.getpid() in processes.ancestors(child.pid)
    finally:
        child.kill()
        child.wait()
    assert not processes.is_running(f"{child.pid}:1")
    with pytest.raises(ProcessLookupError):
        processes.token(child.pid)

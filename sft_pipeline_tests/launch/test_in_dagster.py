"""Kills and terminations of a Dagster run: no trainer is left, the pool is free, and the retry finds nobody
there.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from sft_pipeline.launch import processes
from sft_pipeline_tests.launch.helpers import clean_up, pids_in, running, wait_until

pytestmark = pytest.mark.skipif(not processes.LINUX, reason="supervision of whole trees is for Linux")


@pytest.mark.parametrize("case", ["step worker killed", "run worker killed", "run terminated"])
def test_no_trainer_is_left(tmp_path: Path, home: Path, case: str):
    worker = subprocess.Popen(
        [sys.executable, "-m", "sft_pipeline_tests.launch.dagster_job"],
        env={**os.environ, "TEST_FOLDER": str(tmp_path)},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    tree: list[str] = []
    try:
        tree = pids_in(tmp_path / "pids", 2, seconds=90)
        if case == "step worker killed":
            os.kill(int((tmp_path / "step_worker").read_text()), signal.SIGKILL)
        elif case == "run worker killed":
            worker.kill()
        else:  # as the run launcher does for the UI
            with dg.DagsterInstance.get() as instance:
                instance.report_run_canceling(instance.get_runs()[0])
            worker.terminate()
        wait_until(lambda: not running(tree))
        if case == "step worker killed":
            assert worker.wait(90) == 0  # the retry went through
            assert (
                tmp_path / "left"
            ).read_text() == "0"  # and it did not start before the first trainer was gone
        else:
            worker.wait(90)
            assert not (tmp_path / "left").exists()
    finally:
        worker.kill()
        worker.wait()
        clean_up(tree)
    if case != "run worker killed":  # that one is the reaper's and the run monitor's
        with dg.DagsterInstance.get() as instance:
            (run,) = instance.get_runs()
            assert run.status == (
                dg.DagsterRunStatus.SUCCESS if case == "step worker killed" else dg.DagsterRunStatus.CANCELED
            )
            assert not instance.event_log_storage.get_concurrency_info("gpu").claimed_slots

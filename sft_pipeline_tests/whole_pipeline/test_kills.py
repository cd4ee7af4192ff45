"""Whatever dies, no trainer is left behind, and the next run goes on from the last whole checkpoint.

Every day one kill of the whole `sft run`; `launch/` has every other death on children that import no torch.
"""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sft_pipeline_tests.command import environment_of, sft, sft_command

LONG = {
    "sanity": {"skip": True},
    "training": {"max_steps": None, "epochs": 24, "eval_steps": 6, "per_device_batch": 2},
}
RUN = ("run", "small_lora", "--until", "trained_checkpoints", "--json")


def trainers(home: Path) -> list[psutil.Process]:
    """The living processes whose command line names this SFT_HOME's work folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if any(str(home / "work") in part for part in process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def wait_until(condition: Callable[[], object], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def start_and_wait_for_a_checkpoint(home: Path, config: Path) -> subprocess.Popen[str]:
    run = subprocess.Popen(
        sft_command(*RUN),
        env=environment_of(home, config),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(
        lambda: any(home.glob("work/*/checkpoint-*/bundle.json")) or run.poll() is not None,
        240,
        "no checkpoint was written",
    )
    assert run.poll() is None, run.stderr.read()[-3000:]
    return run


def training_of(result: dict[str, Any]) -> dict[str, Any]:
    training = json.loads(Path(result["artifacts"]["trained_checkpoints"], "training.json").read_text())
    assert training["updates"]["done"] == training["updates"]["planned"] > 20
    return training


@pytest.mark.parametrize(
    "victim",
    [
        "run worker",
        pytest.param("supervisor", marks=pytest.mark.slow),
        pytest.param("hung trainer", marks=pytest.mark.slow),
    ],
)
def test_a_kill_leaves_nothing_and_the_next_run_resumes(
    branch: Callable[..., Path], tmp_path: Path, victim: str
) -> None:
    home, config = tmp_path / "home", branch(recipe=LONG)
    run = start_and_wait_for_a_checkpoint(home, config)
    if victim == "run worker":
        run.kill()
    elif victim == "supervisor":
        next(p for p in trainers(home) if any("supervise" in part for part in p.cmdline())).kill()
    else:
        for process in trainers(home):
            if any("launch.child" in part for part in process.cmdline()):
                process.send_signal(signal.SIGSTOP)
        run.send_signal(signal.SIGTERM)
    if victim == "supervisor":
        # The step sees its child die and tries again by itself, from the checkpoint.
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-3000:]
        training_of(json.loads(out))
    else:
        wait_until(lambda: not trainers(home), 20, "a trainer is left behind")
        assert run.wait(60) == (-signal.SIGKILL if victim == "run worker" else 4)
        ran = sft(*RUN, home=home, config=config, children=True)
        assert ran.code == 0, ran.stderr[-3000:]
        training_of(ran.json)
        assert "resuming after update" in ran.stderr
    assert not trainers(home)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_is_resumed_by_one(branch: Callable[..., Path], tmp_path: Path) -> None:
    two = {**LONG["training"], "processes": 2, "per_device_batch": 1}
    model = {"base": "data/base_model", "lora": {"dropout": 0}}
    home, config = tmp_path / "home", branch(recipe=LONG | {"training": two, "model": model})
    run = start_and_wait_for_a_checkpoint(home, config)
    run.kill()
    wait_until(lambda: not trainers(home), 20, "a trainer is left behind")
    one = ("--set", "training.processes=1", "--set", "training.blocks_per_update=2")
    ran = sft(*RUN, *one, home=home, config=config, children=True)
    assert ran.code == 0, ran.stderr[-3000:]
    assert "are made by 1 process" in ran.stderr
    assert len({p.parent for p in home.glob("work/*/checkpoint-*")}) <= 1, "it trained in another folder"
    assert [d["processes"] for d in training_of(ran.json)["divisions"]] == [2, 1]
    manifest = Path(ran.json["artifacts"]["trained_checkpoints"], "manifest.json").read_text()
    assert json.loads(manifest)["config"]["training"]["processes"] == 1
    assert all(c["passed"] for c in ran.json["checks"] if c["name"] == "budget_as_planned")

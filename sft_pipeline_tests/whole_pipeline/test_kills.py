"""Whatever dies, no trainer is left behind, and the next run goes on from the last whole checkpoint.

Every day the whole `sft run` is killed once and terminated once; `launch/` has the other deaths, of children
that import no torch.
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
    "tokens": {"max_length": 96},
    "sanity": {"skip": True},
    "training": {"max_steps": None, "epochs": 8, "eval_steps": 6, "per_device_batch": 2},
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


def checkpoints(home: Path) -> set[Path]:
    return set(home.glob("work/*/checkpoint-*/bundle.json"))


def start_and_wait_for_a_checkpoint(home: Path, config: Path) -> subprocess.Popen[str]:
    before = checkpoints(home)
    run = subprocess.Popen(
        sft_command(*RUN),
        env=environment_of(home, config),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: checkpoints(home) - before or run.poll() is not None, 240, "no checkpoint was written")
    assert run.poll() is None, run.stderr.read()[-3000:]
    return run


def training_of(result: dict[str, Any]) -> dict[str, Any]:
    training = json.loads(Path(result["artifacts"]["trained_checkpoints"], "training.json").read_text())
    assert training["updates"]["done"] == training["updates"]["planned"] > 20
    return training


def test_killed_and_then_terminated_it_leaves_nothing_and_the_next_run_resumes(
    branch: Callable[..., Path], tmp_path: Path
) -> None:
    home, config = tmp_path / "home", branch(recipe=LONG)
    run = start_and_wait_for_a_checkpoint(home, config)
    run.kill()
    wait_until(lambda: not trainers(home), 20, "a trainer is left behind by a kill")
    assert run.wait(60) == -signal.SIGKILL
    run = start_and_wait_for_a_checkpoint(home, config)
    for process in trainers(home):
        if any("launch.child" in part for part in process.cmdline()):
            process.send_signal(signal.SIGSTOP)  # a trainer that hangs
    run.send_signal(signal.SIGTERM)
    wait_until(lambda: not trainers(home), 20, "a trainer is left behind by a termination")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 4, err[-3000:]
    assert json.loads(out)["status"] == "interrupted" and "resuming after update" in err
    ran = sft(*RUN, home=home, config=config)
    assert ran.code == 0, ran.stderr[-3000:]
    assert "resuming after update" in ran.stderr
    training_of(ran.json)


@pytest.mark.slow
def test_a_step_whose_supervisor_is_killed_goes_on_by_itself(
    branch: Callable[..., Path], tmp_path: Path
) -> None:
    home, config = tmp_path / "home", branch(recipe=LONG)
    run = start_and_wait_for_a_checkpoint(home, config)
    next(p for p in trainers(home) if any("supervise" in part for part in p.cmdline())).kill()
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0 and "resuming after update" in err, err[-3000:]
    training_of(json.loads(out))
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

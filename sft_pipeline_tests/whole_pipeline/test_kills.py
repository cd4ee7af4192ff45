"""Whatever dies, no trainer is left behind, no pool slot stays held, and the next run goes on from the last whole checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sft_pipeline_tests.command import ROOT, sft

SLOW = {
    "sanity": {"skip": True},
    "training": {"max_steps": None, "epochs": 24, "eval_steps": 6, "per_device_batch": 2},
    "evaluation": {"max_rows": 4, "max_new_tokens": 8, "require_improvement": False},
}


def family(marker: str) -> list[psutil.Process]:
    """Every process whose command line or environment-given spec names this SFT_HOME's work folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(marker in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def start(home: Path, config: Path) -> subprocess.Popen[str]:
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("DAGSTER_HOME", "MLFLOW_TRACKING_URI", "SFT_DAGSTER_DIR")
    }
    env |= {"SFT_HOME": str(home), "SFT_PROJECT_ROOT": str(ROOT), "SFT_CONFIG_PATH": str(config)}
    command = [
        sys.executable,
        "-m",
        "sft_pipeline.cli",
        "run",
        "small_lora",
        "--until",
        "trained_checkpoints",
        "--json",
    ]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def a_checkpoint(home: Path) -> bool:
    return any(home.glob("work/*/checkpoint-*/bundle.json"))


@pytest.mark.parametrize("victim", ["run worker", "supervisor", "hung trainer"])
def test_a_kill_leaves_nothing_and_the_next_run_resumes(
    branch: Callable[..., Path], tmp_path: Path, victim: str
) -> None:
    home, config = tmp_path / "home", branch(recipe=SLOW)
    run = start(home, config)
    until(lambda: a_checkpoint(home) or run.poll() is not None, 240, "no checkpoint was written")
    assert run.poll() is None, run.stderr.read()[-3000:]
    trainers = family(str(home / "work"))
    assert trainers
    if victim == "run worker":
        run.kill()
    elif victim == "supervisor":
        next(p for p in trainers if any("supervise" in part for part in p.cmdline())).kill()
    else:
        for process in trainers:
            if any("launch.child" in part for part in process.cmdline()):
                process.send_signal(signal.SIGSTOP)
        run.send_signal(signal.SIGTERM)
    if victim == "supervisor":
        # The step sees its child die and tries again by itself, from the checkpoint.
        out, err = run.communicate(timeout=300)
        assert run.returncode == 0, err[-3000:]
        result = json.loads(out.splitlines()[-1])
    else:
        until(
            lambda: (
                not [
                    p
                    for p in family(str(home / "work"))
                    if p.is_running() and p.status() != psutil.STATUS_ZOMBIE
                ]
            ),
            20,
            "a trainer is left behind",
        )
        code = run.wait(60)
        assert code == (-signal.SIGKILL if victim == "run worker" else 4)
        ran = sft("run", "small_lora", "--until", "trained_checkpoints", "--json", home=home, config=config)
        assert ran.code == 0, ran.stderr[-3000:]
        result = ran.json
        assert "resum" in ran.stderr
    training = json.loads(Path(result["artifacts"]["trained_checkpoints"], "training.json").read_text())
    assert training["updates"]["done"] == training["updates"]["planned"] > 20
    assert not family(str(home / "work"))


def test_a_killed_run_of_two_processes_is_resumed_by_one(branch: Callable[..., Path], tmp_path: Path) -> None:
    two = {**SLOW["training"], "processes": 2, "per_device_batch": 1}
    home = tmp_path / "home"
    config = branch(
        recipe=SLOW | {"training": two, "model": {"base": "data/base_model", "lora": {"dropout": 0}}}
    )
    run = start(home, config)
    until(lambda: a_checkpoint(home) or run.poll() is not None, 240, "no checkpoint was written")
    assert run.poll() is None, run.stderr.read()[-3000:]
    run.kill()
    until(
        lambda: not [p for p in family(str(home / "work")) if p.status() != psutil.STATUS_ZOMBIE],
        20,
        "a trainer is left behind",
    )
    one = ("--set", "training.processes=1", "--set", "training.blocks_per_update=2")
    ran = sft("run", "small_lora", "--until", "trained_checkpoints", *one, "--json", home=home, config=config)
    assert ran.code == 0, ran.stderr[-3000:]
    assert "are made by 1 process" in ran.stderr
    assert len({p.parent for p in home.glob("work/*/checkpoint-*")}) <= 1, "it trained in another folder"
    folder = Path(ran.json["artifacts"]["trained_checkpoints"])
    training = json.loads((folder / "training.json").read_text())
    assert [d["processes"] for d in training["divisions"]] == [2, 1]
    assert training["updates"]["done"] == training["updates"]["planned"]
    assert json.loads((folder / "manifest.json").read_text())["config"]["training"]["processes"] == 1
    assert all(c["passed"] for c in ran.json["checks"] if c["name"] == "budget_as_planned")

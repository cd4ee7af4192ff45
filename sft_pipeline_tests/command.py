"""The command line as a user meets it: its exit code, its JSON, its stderr."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from sft_pipeline.cli.main import main
from sft_pipeline.stages.stage import Build, Built, Stage

ROOT = Path(__file__).resolve().parents[1]
OF_THE_CALLER = (
    "SFT_HOME",
    "SFT_PROJECT_ROOT",
    "SFT_CONFIG_PATH",
    "SFT_DAGSTER_DIR",
    "DAGSTER_HOME",
    "MLFLOW_TRACKING_URI",
    "TENSORBOARD_LOGGING_DIR",  # which a training in the process of the tests has set for itself
)


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, its JSON (None where stdout was empty), its stderr."""

    code: int
    json: dict[str, Any] | None
    stderr: str


def environment_of(home: Path, config: Path | None = None, **more: str) -> dict[str, str]:
    """The environment of a command with an SFT_HOME of its own; the caller's own settings are left out."""
    env = {name: value for name, value in os.environ.items() if name not in OF_THE_CALLER}
    env |= {"SFT_HOME": str(home), "SFT_PROJECT_ROOT": str(ROOT)}
    if config:
        env["SFT_CONFIG_PATH"] = str(config)
    return env | more


def sft(
    *arguments: str, home: Path, config: Path | None = None, children: bool = False, **environment: str
) -> Ran:
    """Runs `sft` in this process: torch is imported once for all tests, not for 8 CPU seconds in each.

    Args:
        children: Whether the model stages run in supervised children, as they do for a user. They run here
            too where a test does not look at processes.
    """
    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    launcher = contextlib.nullcontext() if children else _stages_run_here()
    with (
        mock.patch.dict(os.environ, environment_of(home, config, **environment), clear=True),
        mock.patch.object(sys, "argv", ["sft", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
        launcher,
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
    return _ran(arguments, code, out.getvalue(), err.getvalue())


def sft_process(*arguments: str, home: Path, config: Path | None = None, **environment: str) -> Ran:
    """Runs `sft` in a process of its own: for tests of exit status and stdout, and for whole branches."""
    done = subprocess.run(
        sft_command(*arguments),
        capture_output=True,
        text=True,
        env=environment_of(home, config, **environment),
        timeout=1200,
        stdin=subprocess.DEVNULL,
    )
    return _ran(arguments, done.returncode, done.stdout, done.stderr)


def sft_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sft_pipeline.cli", *arguments]


def _ran(arguments: tuple[str, ...], code: int, stdout: str, stderr: str) -> Ran:
    """With --json, stdout is one JSON object and nothing else."""
    if "--json" not in arguments:
        return Ran(code, None, stderr)
    [line] = stdout.splitlines()
    return Ran(code, json.loads(line), stderr)


@contextlib.contextmanager
def _stages_run_here() -> Iterator[None]:
    def run_here(stage: Stage, build: Build, **_: Any) -> Built:
        return stage.load_build()(build)

    with mock.patch("sft_pipeline.launch.launcher.run_isolated", run_here):
        yield

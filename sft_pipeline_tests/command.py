"""The command line as a user runs it: a process of its own, its exit code, its JSON, its stderr."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, its JSON (None where stdout was empty), its stderr."""

    code: int
    json: dict[str, Any] | None
    stderr: str


def sft(*arguments: str, home: Path, config: Path | None = None, **environment: str) -> Ran:
    """Runs `sft` in a process of its own."""
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("DAGSTER_HOME", "MLFLOW_TRACKING_URI", "SFT_DAGSTER_DIR", "SFT_CONFIG_PATH")
    }
    env |= {"SFT_HOME": str(home), "SFT_PROJECT_ROOT": str(ROOT)} | environment
    if config:
        env["SFT_CONFIG_PATH"] = str(config)
    done = subprocess.run(
        [sys.executable, "-m", "sft_pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return Ran(done.returncode, json.loads(lines[-1]) if lines else None, done.stderr)

"""What an artifact was built with. It is part of no data version, and holds no path and no secret."""

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sft_pipeline.project import PACKAGE_DIR

RECORDED_PACKAGES = (
    "sft-pipeline",
    "dagster",
    "mlflow",
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "pyarrow",
    "numpy",
    "flash-attn",
)


def environment() -> dict[str, Any]:
    """The manifest's `environment`."""
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in RECORDED_PACKAGES if (found := package_version(name))},
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpus": os.cpu_count(),
        "accelerator": accelerator(),
    }


@lru_cache
def package_version(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache
def accelerator() -> str | None:
    """The name of the first GPU; None without one. The driver is asked: importing torch costs seconds."""
    names = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines()[0] if names else None


@lru_cache
def _git_commit() -> str | None:
    git = ("git", "-C", str(PACKAGE_DIR))
    commit = output_of(*git, "rev-parse", "HEAD")
    changed = output_of(*git, "status", "--porcelain", "--", ".")
    return f"{commit}-dirty" if commit and changed else commit


def output_of(*command: str) -> str | None:
    """What a program prints; None where it is not there, fails, hangs or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None

"""Where things are: the project root (the folder of dagster.yaml), and SFT_HOME with all that is written."""

import os
import tempfile
from functools import lru_cache
from pathlib import Path

from sft_pipeline.errors import InputError

PACKAGE_DIR = Path(__file__).resolve().parent
NO_TELEMETRY = ("DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")
"""Set in every process: nothing is sent anywhere that nobody asked for. Dagster's is off in dagster.yaml."""


@lru_cache
def _root_from(cwd: Path) -> Path:
    for folder in (cwd, *cwd.parents):
        if (folder / "dagster.yaml").is_file():
            return folder
    return PACKAGE_DIR.parent


def project_root() -> Path:
    """The nearest folder at or above the working directory with a dagster.yaml, else the package's parent."""
    explicit = os.environ.get("SFT_PROJECT_ROOT")
    return Path(explicit).resolve() if explicit else _root_from(Path.cwd())


def sft_home() -> Path:
    """`$SFT_HOME`, by default `.sft` beside dagster.yaml."""
    return project_path(os.environ.get("SFT_HOME") or ".sft")


def project_path(path: str | os.PathLike[str]) -> Path:
    """A path of the configuration as an absolute one: relative paths start at the project root."""
    # Unlike the methods of Path, these let a loop of links and an unknown ~user pass, to be met when opened.
    return Path(os.path.realpath(project_root() / os.path.expanduser(path)))


def switch_telemetry_off() -> None:
    """For this process and every process it starts."""
    for name in NO_TELEMETRY:
        os.environ.setdefault(name, "true")


def set_environment() -> None:
    """Points Dagster and MLflow at SFT_HOME, for this process and every process it starts.

    Raises:
        InputError: Nothing can be written there.
    """
    home = sft_home()
    switch_telemetry_off()
    os.environ["SFT_PROJECT_ROOT"] = str(project_root())
    os.environ["SFT_HOME"] = str(home)
    os.environ.setdefault("DAGSTER_HOME", str(project_root()))
    target = home / "dagster"
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise InputError(
            f"SFT_HOME {home} cannot be written: {error.strerror or error}. Set SFT_HOME to a folder that can"
        ) from None
    os.environ["SFT_DAGSTER_DIR"] = str(target)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")

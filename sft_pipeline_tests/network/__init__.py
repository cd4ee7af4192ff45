"""What leaves this machine: written down by `guard/sitecustomize.py` in every Python process of a command."""

import json
from pathlib import Path
from typing import Any

GUARD = Path(__file__).parent / "guard"


def watched_by(log: Path) -> dict[str, str]:
    """The environment in which a command and every Python process it starts is watched."""
    return {"PYTHONPATH": str(GUARD), "SFT_TEST_NETWORK_LOG": str(log)}


def entries(log: Path, kind: str) -> list[Any]:
    """What was written down: the command lines that were "watched", or the calls that were "found"."""
    lines = map(json.loads, log.read_text().splitlines())
    return [line[kind] for line in lines if kind in line]

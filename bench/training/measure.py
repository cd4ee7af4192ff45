"""One measurement: a child process, which measures itself."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from training.setting import Setting

BENCH = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measured:
    """What one training took.

    Attributes:
        first: Seconds from the ready process to the end of the first update: model, trainer, update.
        seconds: Wall seconds of each later update.
        cpu_seconds: Of all threads, for each later update: what remains comparable on a busy machine.
        losses: Of every update.
        peak: Bytes: the GPU's, or the resident size of the process.
        before: The same when the process was ready.
        threads: Of torch.
        layout: Of the feed, of this pipeline only.
        flops: That an update must compute.
        attention: The implementation that ran.
    """

    first: float
    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    peak: float
    before: float
    threads: int
    layout: str
    flops: float
    attention: str


def measure(side: str, setting: Setting, rows: Path, updates: int) -> Measured:
    """Runs a side in a fresh process.

    Raises:
        RuntimeError: It failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = {"side": side, "setting": asdict(setting), "rows": str(rows), "updates": updates}
        done = subprocess.run(
            [sys.executable, "-m", "training.sides", str(result)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=BENCH,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
        )
        if done.returncode or not result.is_file():
            raise RuntimeError(
                f"{side} on {setting.name} failed with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return Measured(**json.loads(result.read_text()))

"""One measurement: a child process, and the memory of its process tree while it works."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from plane.systems import Job

BENCH = Path(__file__).resolve().parents[1]
EVERY = 0.05  # seconds between samples of the resident size
SHARES_EVERY = 5  # samples of the resident size per sample of the proportional one, which costs more
MIB = 1 << 20


@dataclass(frozen=True)
class Measured:
    """What one run of a system took.

    Attributes:
        seconds: Wall seconds of the work; what it imports while it works is in them. with_imports: Wall
        seconds from the start of the process to the end of the work. cpu: User and system seconds of the
        process and of those it started and waited for, imports included. rss: Peak of the resident sizes of
        the process tree, summed (MiB): what forked processes share counts for each. pss: The same with shared
        pages divided among their users (MiB), so close to what the machine must have; None
            where the system does not tell.
        rss_before: Resident size after the imports, when the work began (MiB).
        figures: What the system reports of its own.
    """

    seconds: float
    with_imports: float
    cpu: float
    rss: float
    pss: float | None
    rss_before: float
    figures: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Bytes of the whole process tree at one time."""

    time: float
    rss: int
    pss: int | None


def measure(job: Job) -> Measured:
    """Runs the job's system in a fresh process.

    Raises:
        RuntimeError: The system failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        with log.open("wb") as stream:
            launched, before_cpu = time.time(), children_cpu()
            child = subprocess.Popen(
                [sys.executable, "-m", "plane.systems", str(result)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=stream,
                cwd=BENCH,
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "SFT_PROJECT_ROOT": str(BENCH.parent),
                    "SFT_HOME": job.scratch,
                    "HF_HOME": f"{job.scratch}/hf",
                },
            )
            assert child.stdin is not None
            child.stdin.write(json.dumps(asdict(job)).encode())
            child.stdin.close()
            samples = _watch(child)
            cpu = children_cpu() - before_cpu
        if child.returncode or not result.is_file():
            raise RuntimeError(
                f"{job.system} failed with {child.returncode}:\n{log.read_text(errors='replace')[-3000:]}"
            )
        figures = json.loads(result.read_text())
    started, ended = figures.pop("started"), figures.pop("ended")
    before = [s.rss for s in samples if s.time < started]
    during = [s for s in samples if started <= s.time <= ended]
    shares = [s.pss for s in during if s.pss is not None]
    return Measured(
        seconds=figures.pop("seconds"),
        with_imports=ended - launched,
        cpu=cpu,
        rss=max((s.rss for s in during), default=before[-1]) / MIB,
        pss=max(shares) / MIB if shares else None,
        rss_before=before[-1] / MIB,
        figures=figures,
    )


def children_cpu() -> float:
    """Of all processes that ended so far below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watch(child: subprocess.Popen) -> list[Sample]:
    """Samples until the child is done."""
    samples: list[Sample] = []
    root = psutil.Process(child.pid)
    while child.poll() is None:
        samples.append(_sample(root, shares=len(samples) % SHARES_EVERY == 0))
        time.sleep(EVERY)
    return samples


def _sample(root: psutil.Process, *, shares: bool) -> Sample:
    rss, pss = 0, 0 if shares and psutil.LINUX else None
    now = time.time()
    for process in _tree(root):
        try:
            rss += process.memory_info().rss
            if pss is not None:
                pss += process.memory_full_info().pss
        except psutil.Error:  # it ended between the listing and the look
            continue
    return Sample(now, rss, pss)


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []

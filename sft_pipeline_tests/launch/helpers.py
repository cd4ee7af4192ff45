"""Real processes that misbehave, and what the tests ask about them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sft_pipeline.launch import processes

# A process that starts two grandchildren in sessions of their own, one stopped and one deaf to SIGTERM, and
# an orphan whose parent has gone; then it hangs, deaf as well. Every pid lands in a file named by the first
# argument.
HANGING_TREE = """
import os, signal, subprocess, sys, time
def note():
    with open(sys.argv[1], "a") as f: f.write(f"{os.getpid()}\\n")
role = sys.argv[2] if len(sys.argv) > 2 else "root"
def start(role):
    subprocess.Popen([sys.executable, "-S", __file__, sys.argv[1], role], start_new_session=True)
if role == "stopped":
    note(); os.kill(os.getpid(), signal.SIGSTOP)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if role == "middle":
    start("orphan"); sys.exit()
note()
if role == "root":
    start("stopped"); start("deaf"); start("middle")
while True: time.sleep(60)
"""


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for something to become true; that it never does is a failure."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def pids_in(path: Path, count: int, seconds: float = 20.0) -> list[str]:
    """The tokens of the processes that noted their pids in a file, once there are `count` of them."""
    wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= count, seconds)
    return [processes.token(int(line)) for line in path.read_text().splitlines()]


def running(tokens: list[str]) -> list[str]:
    return [t for t in tokens if processes.is_running(t)]


def start_hanging_tree(folder: Path) -> list[str]:
    """The command of a hanging tree which notes 4 pids in `folder/pids`."""
    script = folder / "tree.py"
    script.write_text(HANGING_TREE)
    return [sys.executable, "-S", str(script), str(folder / "pids")]


@contextmanager
def supervised(folder: Path, *command: str, options: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
    """A supervisor of a command, with its lock in `folder`; killed at the end."""
    arguments = [
        sys.executable,
        "-m",
        "sft_pipeline.launch.supervise",
        "--lock",
        str(folder / ".lock"),
        *options,
        "--",
        *command,
    ]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def clean_up(tokens: list[str]) -> None:
    """Kills what a failed test has left."""
    for t in running(tokens):
        os.kill(processes.parse(t)[0], signal.SIGKILL)

"""Build functions that do in the child what can happen to a stage."""

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sft_pipeline.config.base import Config
from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.stages.stage import Build, BuildFunction, Built, Check, Evidence, number, table


class Inner(Config):
    rate: float = 0.5


class Toy(Config):
    """What a toy stage does."""

    do: str = "build"
    inner: Inner = Inner()
    folder: str = ""


def note(build: Build, name: str = "pids") -> None:
    with (Path(build.config.folder) / name).open("a") as stream:
        stream.write(f"{os.getpid()}\n")


def load_build() -> BuildFunction:
    return build


def build(b: Build) -> Built:
    what = b.config.do
    b.report.log(f"doing {what} in {b.asset} of {b.snapshot}")
    return globals()[f"do_{what}"](b)


def do_build(b: Build) -> Built:
    import numpy

    assert not list(b.out.iterdir())
    assert not {"dagster", "mlflow", "torch"} & set(sys.modules), "the child is to be light"
    for step in range(3):
        b.report.progress("steps", step + 1, 3, "steps")
        b.report.metrics({"loss": 1.0 / (step + 1)}, step)
    b.report.samples([{"prompt": "p", "reply": "r", "expected": "e"}], 2)
    (b.out / "out.txt").write_text(b.inputs["first"].file("value.txt").read_text() + str(b.config.inner.rate))
    check = Check("good", True, "fine", {"rows": table([{"a": 1, "b": "x"}])})
    return Built(
        {"rows": numpy.int64(7)},
        (check,),
        ("log/",),
        {"rate": Evidence("number", numpy.float32(0.5)), "n": number(3)},
    )


def do_register_exit_function(b: Build) -> Built:
    """As W&B does, which sends its last rows in one."""
    atexit.register(note, b, "exit functions")
    return Built({"rows": 1})


def do_input_error(b: Build) -> Built:
    raise InputError("rows.jsonl:3: no completion. Give one")


def do_blocked(b: Build) -> Built:
    raise BlockedError("not accepted")


def do_crash(b: Build) -> Built:
    print("about to crash", flush=True)
    raise KeyError("surprise")


def do_memory(b: Build) -> Built:
    raise MemoryError("cannot get 12 GiB")


def do_disk_full(b: Build) -> Built:
    raise OSError(28, "No space left on device")


def do_sigkill(b: Build) -> Built:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def do_hang(b: Build) -> Built:
    """Hangs, deaf to signals, with a helper in a session of its own that is stopped."""
    helper = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    stopped = subprocess.Popen([sys.executable, "-S", "-c", helper], start_new_session=True)
    signal.pthread_sigmask(
        signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT]
    )  # like a loop in C: no handler ever runs
    (b.out / "half").write_text("written")
    with (Path(b.config.folder) / "pids").open("a") as stream:
        stream.write(f"{os.getpid()}\n{stopped.pid}\n")
    while True:
        time.sleep(60)


def do_hang_once(b: Build) -> Built:
    """Hangs the first time; the second time, it is built if nothing of the first is left."""
    pids = Path(b.config.folder) / "pids"
    if not pids.exists():
        return do_hang(b)
    left = [p for p in pids.read_text().split() if "State:\tZ" not in _status(p)]
    return Built({"left": len(left)})


def _status(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "State:\tZ"


def do_wait(b: Build) -> Built:
    note(b)
    while True:
        time.sleep(60)


def do_ranks(b: Build) -> Built:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    note(b)
    while len((Path(b.config.folder) / "pids").read_text().splitlines()) < world:
        time.sleep(0.02)
    return Built({"world": world, "rank": rank})


def do_second_rank_fails(b: Build) -> Built:
    if os.environ["RANK"] == "1":
        raise InputError("only the second rank saw it")
    while True:
        time.sleep(60)


def do_second_rank_killed(b: Build) -> Built:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(60)


def do_ranks_hang(b: Build) -> Built:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    return do_wait(b)

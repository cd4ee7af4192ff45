"""The process in which an isolated stage is built: `python -m sft_pipeline.launch.child ORDER.json`.

One process, or one rank of torchrun. Rank 0 reports and writes the result; the others work silently, and tell only why
they failed. Here torch may be imported, and neither dagster nor mlflow is.

Exit codes: 0 built; 2, 3 or 4 an expected error (`sft_pipeline.errors`), or 1; the message is in the result file. 4 also
when asked to stop (SIGTERM, SIGINT): at once, since what is worth keeping is in a whole checkpoint already.
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from sft_pipeline.errors import Interrupted
from sft_pipeline.launch import processes
from sft_pipeline.launch.message import Failed, Order, write_built, write_failed
from sft_pipeline.launch.supervise import SUPERVISOR_VARIABLE
from sft_pipeline.reporting import FileReporter, Reporter
from sft_pipeline.store.files import clear_disk_errors

WATCH_SECONDS = 0.5
LEAVE_SECONDS = 60.0


def main(order_path: str) -> int:
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    order = Order.read(Path(order_path))
    result = order.result_of(rank)
    _stop_on_signal(result)
    sys.path += [p for p in order.import_path if p not in sys.path]
    try:
        if rank == 0:
            _empty(Path(order.out))
        with _pipes(rank, order) as report:
            with clear_disk_errors(f"building {order.asset}"):
                built = order.function()(order.to_build(report))
        if rank == 0:
            write_built(result, built)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        failed = Failed.of(
            Interrupted(_STOPPED) if isinstance(error, KeyboardInterrupt) else error, time.time()
        )
        print(failed.traceback or failed.message, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk: the exit code and the log tell it too
            write_failed(result, failed)
        return failed.exit_code


def die_with_parent() -> None:
    """Binds this process's life to its parent's and to the supervisor's; call it first thing, in the main thread.

    The kernel kills it when its parent dies (Linux), even while it is stopped or hangs. The supervisor may be further up
    (torchrun is in between), so a thread watches that one.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    parent = os.getppid()
    processes.set_parent_death_signal()
    # Either may have died before the line above took effect.
    if os.getppid() != parent or (supervisor and not processes.is_running(supervisor)):
        os._exit(Interrupted.exit_code)
    if supervisor:
        threading.Thread(target=_watch, args=(supervisor,), name="watch-supervisor", daemon=True).start()


def _watch(supervisor: str) -> None:
    while processes.is_running(supervisor):
        time.sleep(WATCH_SECONDS)
    os._exit(Interrupted.exit_code)


_STOPPED = "asked to stop; running again resumes"


def _stop_on_signal(result: Path) -> None:
    """SIGTERM and SIGINT end this process at once, with exit code 4 and a result that says so."""
    own = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == own:  # not in a process forked off for loading data
            with contextlib.suppress(Exception):
                write_failed(result, Failed(Interrupted.exit_code, _STOPPED, True, time.time()))
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
        os._exit(Interrupted.exit_code)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _empty(out: Path) -> None:
    """Makes `out` empty. An earlier child on this folder may have written into it between the parent's look and its own end."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def _pipes(rank: int, order: Order) -> Iterator[Reporter]:
    """The reporter of this rank, inside an open Dagster Pipes session where Dagster started this process.

    What the stage reports goes through the events file, for every listener of the parent (Dagster's event log is one of
    them), so Pipes is only told which process works on what: the same lines would show twice.
    """
    if rank != 0:
        yield Reporter()
        return
    report = FileReporter(Path(order.events))
    if not os.environ.get("DAGSTER_PIPES_CONTEXT") or not os.environ.get("DAGSTER_PIPES_MESSAGES"):
        yield report
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        ranks = os.environ.get("WORLD_SIZE", "1")
        pipes.log.info(
            f"{order.asset} is being built by process {os.getpid()}{f' and {int(ranks) - 1} more' if ranks != '1' else ''}"
        )
        yield report


def _arguments() -> str:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sft_pipeline.launch.child ORDER.json")
    return sys.argv[1]


def _leave(code: int) -> None:
    """Ends this process: exit functions run (W&B sends its last rows in one), but nothing may turn a finished build into
    a hang or a crash, as threads and destructors of CUDA, NCCL and data loaders do now and then."""
    backstop = threading.Timer(LEAVE_SECONDS, os._exit, [code])
    backstop.daemon = True
    backstop.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(_arguments()))

"""The process in which an isolated stage is built: `python -m sft_pipeline.launch.child SPEC.json`.

One process, or one rank of torchrun. Rank 0 reports and writes the result; the others are silent, and write
only why they failed. Here torch may be imported, and neither dagster nor mlflow is.

Exit codes: 0 built; 2, 3 or 4 an expected error (`sft_pipeline.errors`), or 1; the message is in the result
file. 4 also when asked to stop (SIGTERM, SIGINT): at once, since what is worth keeping is in a whole
checkpoint already.
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
from sft_pipeline.launch.message import Failed, LaunchSpec, write_built, write_failed
from sft_pipeline.launch.supervise import SUPERVISOR_VARIABLE
from sft_pipeline.reporting import FileReporter, Reporter
from sft_pipeline.store.files import clear_disk_errors

WATCH_SECONDS = 0.5
LEAVE_SECONDS = 60.0
STOPPED = "asked to stop; running again resumes"


def main(spec_path: str) -> int:
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    spec = LaunchSpec.read(Path(spec_path))
    result, out = spec.result_of(rank), Path(spec.out)
    _stop_on_signal(result)
    sys.path += [p for p in spec.import_path if p not in sys.path]
    try:
        if rank == 0:
            # An earlier child on this folder may have written into it after the parent found it empty.
            out.mkdir(parents=True, exist_ok=True)
            for path in out.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        with _reporter(rank, spec) as report, clear_disk_errors(f"building {spec.asset}"):
            built = spec.run(report)
        if rank == 0:
            write_built(result, built)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        cause = Interrupted(STOPPED) if isinstance(error, KeyboardInterrupt) else error
        failed = Failed.of(cause, time.time())
        print(failed.traceback or failed.message, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # a full disk: the exit code and the log have it too
            write_failed(result, failed)
        return failed.exit_code


def die_with_parent() -> None:
    """Binds this process's life to its parent's and the supervisor's; call it first, in the main thread.

    The kernel kills it when its parent dies (Linux), even while it is stopped or hangs. The supervisor may be
    further up (torchrun is in between), so a thread watches that one.
    """
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)
    parent = os.getppid()
    processes.set_parent_death_signal()
    # Either may have died before the line above took effect.
    if os.getppid() != parent or (supervisor and not processes.is_running(supervisor)):
        os._exit(Interrupted.exit_code)

    def watch(supervisor: str) -> None:
        while processes.is_running(supervisor):
            time.sleep(WATCH_SECONDS)
        os._exit(Interrupted.exit_code)

    if supervisor:
        threading.Thread(target=watch, args=(supervisor,), name="watch-supervisor", daemon=True).start()


def _stop_on_signal(result: Path) -> None:
    """SIGTERM and SIGINT end this process at once, with exit code 4 and a result that says so."""
    own = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        if os.getpid() == own:  # not in a process forked off for loading data
            with contextlib.suppress(Exception):
                write_failed(result, Failed(Interrupted.exit_code, STOPPED, True, time.time()))
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
        os._exit(Interrupted.exit_code)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


@contextlib.contextmanager
def _reporter(rank: int, spec: LaunchSpec) -> Iterator[Reporter]:
    """The reporter of this rank, inside an open Dagster Pipes session where Dagster started this process.

    What the stage reports goes through the events file, for every listener of the parent (Dagster's event log
    is one of them). Through Pipes goes only which process works on what: the same lines would appear twice.
    """
    if rank != 0:
        yield Reporter()
        return
    report = FileReporter(Path(spec.events))
    if not os.environ.get("DAGSTER_PIPES_CONTEXT") or not os.environ.get("DAGSTER_PIPES_MESSAGES"):
        yield report
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        others = int(os.environ.get("WORLD_SIZE", "1")) - 1
        more = f" and {others} more" if others else ""
        pipes.log.info(f"{spec.asset} is being built by process {os.getpid()}{more}")
        yield report


def run_and_exit() -> None:
    """Ends this process with `main`'s code; exit functions run (W&B sends its last rows in one), no teardown.

    Threads and destructors of CUDA, NCCL and data loaders now and then turn a finished build into a hang or a
    crash. So the exit function that is registered first, and runs last, ends the process before they are torn
    down; and a timer ends it where an exit function or a thread does not come to an end.
    """
    if len(sys.argv) != 2:
        sys.exit("usage: python -m sft_pipeline.launch.child SPEC.json")
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)
    code = main(sys.argv[1])
    timer = threading.Timer(LEAVE_SECONDS, leave)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    run_and_exit()

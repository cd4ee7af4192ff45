"""The parent's side of an isolated stage: starts the child, forwards its reports, raises its error."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from sft_pipeline.errors import Interrupted, SftError
from sft_pipeline.launch.message import ERRORS, Failed, LaunchSpec, read_result
from sft_pipeline.launch.processes import descendants, is_running, kill_carrying, send, token
from sft_pipeline.launch.supervise import (
    EXIT_CANNOT_START,
    EXIT_LOCKED,
    EXIT_STOPPED,
    EXIT_WATCHED_GONE,
    SIGNALS,
    SUPERVISOR_VARIABLE,
)
from sft_pipeline.reporting import Reporter, replay
from sft_pipeline.stages.stage import Build, Built, Stage

LOG = "child.log"
LOCK = ".lock"
LAUNCHES = "launches"
POLL_SECONDS = 0.3
GRACE_SECONDS = 2.0
HARD_STOP_SECONDS = GRACE_SECONDS + 3.0
LOG_LINES = 30

# Set by torchrun for each rank. Where the parent is one itself, its child is not.
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_RANK_KILLED = re.compile(r"exitcode\s*:\s*-(\d+)")  # torchrun's summary of a rank that a signal ended


def run_isolated(
    stage: Stage,
    build: Build,
    *,
    processes: int = 1,
    watch: Sequence[str] = (),
    extra_env: Mapping[str, str] | None = None,
    lock_wait_seconds: float = 60.0,
) -> Built:
    """Builds a stage in a supervised child process, forwarding its reports to `build.report` as they come.

    The child, and all that it starts, ends with this process, with any watched one, and with this call.
    Another child on the same work folder (of a run that was killed a moment ago) is waited for first.

    Args:
        processes: Data-parallel ranks on this machine; more than one are started by torchrun.
        watch: Further processes the child must not outlive, such as the worker of the Dagster run: a pid, a
            token `pid:start` or an identity (`reaper.process_identity`).
        extra_env: Environment variables for the child; those of a Dagster Pipes session, for example.
        lock_wait_seconds: How long to wait for another child on the same work folder.

    Raises:
        InputError, BlockedError, Interrupted, SftError: As the child raised them. Interrupted also where the
            child was stopped from outside; SftError with the signal's name where one killed it.
    """
    build.work.mkdir(parents=True, exist_ok=True)
    with _launch_folder(build.work) as folder:
        spec = LaunchSpec.of(stage, build, folder)
        spec.write(folder / "spec.json")
        Path(spec.events).touch()
        module = ["-m", "sft_pipeline.launch.child", str((folder / "spec.json").absolute())]
        if processes > 1:
            ranks = ["--standalone", "--nproc_per_node", str(processes)]
            module = ["-m", "torch.distributed.run", *ranks, *module]
        watched = [token(), *map(watched_token, watch)]
        options = {
            "--lock": str(build.work.absolute() / LOCK),
            "--lock-wait": str(lock_wait_seconds),
            "--grace": str(GRACE_SECONDS),
            "--events": spec.events,
        }
        command = [
            *(sys.executable, "-m", "sft_pipeline.launch.supervise"),
            *(part for name in watched for part in ("--watch", name)),
            *(part for option in options.items() for part in option),
            *("--", sys.executable, *module),
        ]
        code, log_tail = _supervise(build, command, extra_env or {}, Path(spec.events))
        return _outcome(build.asset or stage.name, spec, processes, code, build.work / LOG, log_tail)


def watched_token(watched: str) -> str:
    """The token in any way of naming a process: `pid`, `pid:start` or `host:boot:pid:start`.

    Raises:
        Interrupted: There is no such process any more.
    """
    if watched.isdigit():
        try:
            return token(int(watched))
        except ProcessLookupError:
            raise Interrupted(f"process {watched}, on whose behalf this one works, is gone") from None
    return ":".join(watched.split(":")[-2:])


def _supervise(
    build: Build, command: Sequence[str], extra_env: Mapping[str, str], events: Path
) -> tuple[int, str]:
    """Runs a supervisor to its end, forwarding reports. Returns its exit code and the log's last lines."""
    environment = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns whenever a data loader forks
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **extra_env}
    supervisor: subprocess.Popen[bytes] | None = None
    name = ""
    tail = _EventTail(events, build.report)
    with (build.work / LOG).open("ab") as log:
        log.write(f"--- {build.asset} {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
        log.flush()
        log_start = log.tell()
        try:
            # A session of its own: Ctrl-C in the terminal reaches this process only, which then ends the
            # child in order. Signals wait, so that no exception comes between starting a process and knowing
            # its name.
            with _signals_blocked(SIGNALS):
                supervisor = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                name = token(supervisor.pid)
            code = None
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = supervisor.wait(POLL_SECONDS)
                tail.forward()
        except BaseException:
            if supervisor is not None:
                stop(supervisor, name)
            raise
        if code < 0:  # the supervisor itself was killed: see to it that nothing of it is left
            stop(supervisor, name)
    return code, _last_lines(build.work / LOG, log_start, LOG_LINES)


def _outcome(name: str, spec: LaunchSpec, ranks: int, code: int, log: Path, log_tail: str) -> Built:
    """What the child built, or its error, from the supervisor's exit code and the results of the ranks."""
    where = f"Its log: {log}" + (f"\n{log_tail}" if log_tail else "")
    if code == EXIT_LOCKED:
        raise SftError(
            f"{name}: another process still builds in {log.parent}, and did not end in time. "
            "Stop it, or wait for it, and run again"
        )
    if code in (EXIT_STOPPED, EXIT_WATCHED_GONE):
        raise Interrupted(f"{name} was stopped from outside; running again resumes")
    if code == EXIT_CANNOT_START:
        raise SftError(f"{name}: the child process cannot be started. {where}")
    results = [read_result(spec.result_of(rank)) for rank in range(ranks)]
    # One process that wrote its result had nothing left to do; of several ranks, the others may have failed.
    if isinstance(results[0], Built) and (code == 0 or ranks == 1):
        return results[0]
    if code == 0:
        raise SftError(f"{name}: the child process ended without a result. {where}")
    killed_rank = _RANK_KILLED.search(log_tail) if ranks > 1 else None
    killed_by = -code if code < 0 else code - 128 if code > 128 else int(killed_rank[1]) if killed_rank else 0
    # The first rank that failed made the others fail; one that was asked to stop did not fail first.
    failures = [r for r in results if isinstance(r, Failed)]
    first = min(failures, key=lambda f: (f.exit_code == Interrupted.exit_code, f.time), default=None)
    if first is not None and (first.exit_code != Interrupted.exit_code or not killed_by):
        if first.expected:
            raise first.error(f"{name}: ")
        raise SftError(f"{name} failed: {first.message}. {where}")
    if killed_by:
        who = "the supervisor of the child process" if code < 0 else "the child process"
        raise SftError(
            f"{name}: {who} was killed by {_signal_words(killed_by)}. Running again resumes. {where}"
        )
    raise ERRORS.get(code, SftError)(f"{name}: the child process ended with exit code {code}. {where}")


def stop(supervisor: subprocess.Popen[bytes], name: str) -> None:
    """Ends a supervisor (of the token `name`) and everything below it: with SIGTERM, then with SIGKILL.

    What interrupts the wait between them (a second Ctrl-C) brings SIGKILL forward; no process is left behind.
    """
    try:
        if supervisor.poll() is None:
            send(supervisor.pid, signal.SIGTERM, signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(HARD_STOP_SECONDS)
    finally:
        if supervisor.poll() is None:
            below = descendants(supervisor.pid)
            supervisor.kill()
            for pid in below:
                send(pid, signal.SIGKILL)
            supervisor.wait()
        kill_carrying(SUPERVISOR_VARIABLE, name)


class _EventTail:
    """Forwards the lines that were added to a FileReporter's file since the last look."""

    def __init__(self, path: Path, report: Reporter) -> None:
        self._path = path
        self._report = report
        self._offset = 0

    def forward(self) -> None:
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            data = stream.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            if line.strip():
                # Half a line of a child that was killed in the middle of it cannot be read; the next one can.
                with contextlib.suppress(ValueError):
                    replay(line.decode(), self._report)


@contextlib.contextmanager
def _signals_blocked(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals wait until the end of the block. A process that is started here must unblock them itself."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _launch_folder(work: Path) -> Iterator[Path]:
    """A folder for the files of one launch, named after this process; those of ended ones are removed."""
    launches = work / LAUNCHES
    for old in launches.glob("*"):
        with contextlib.suppress(ValueError):
            if not is_running(old.name.split("-")[0]):
                shutil.rmtree(old, ignore_errors=True)
    folder = launches / f"{token()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another launch is there
            launches.rmdir()


def _last_lines(log: Path, start: int, count: int) -> str:
    """The last lines of a log from an offset on; of a progress bar that rewrites its line, its last state."""
    with log.open("rb") as stream:
        stream.seek(max(start, stream.seek(0, os.SEEK_END) - 64 * 1024))
        text = stream.read().decode(errors="replace")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def _signal_words(number: int) -> str:
    """A signal's name, and what it most likely means."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        name += (
            " (most likely the system ran out of memory: try a smaller training.per_device_batch, "
            "or close other programs)"
        )
    elif number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT):
        name += " (a crash in native code: a driver, CUDA or an extension; see the end of the log)"
    return name

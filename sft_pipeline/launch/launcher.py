"""The parent's side of an isolated stage: starts the child, passes on what it tells, raises its error, leaves nothing behind."""

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

from sft_pipeline.errors import BlockedError, InputError, Interrupted, SftError
from sft_pipeline.launch.message import Failed, Order, read_result
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

# What tells a process that it is one rank of many: not the child's business where the parent is one itself.
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
    """Builds a stage in a supervised child process, and forwards what it reports to `build.report` as it happens.

    The child, and all that it starts, ends with this process, with any watched one, and with this call. Another child
    on the same work folder (of a run that was killed a moment ago) is waited for first.

    Args:
        processes: Data-parallel ranks on this machine; more than one are started by torchrun.
        watch: Further processes the child must not outlive, such as the worker of the Dagster run: a pid, a token
            `pid:start` or an identity (`reaper.process_identity`).
        extra_env: Environment variables for the child; those of a Dagster Pipes session, for example.
        lock_wait_seconds: How long to wait for another child on the same work folder.

    Raises:
        InputError, BlockedError, Interrupted, SftError: As the child raised them. Interrupted also where the child was
            stopped from outside; SftError with the signal's name where one killed it.
    """
    build.work.mkdir(parents=True, exist_ok=True)
    with _launch_folder(build.work) as folder:
        return _Launch(stage, build, folder, processes).run(
            [token(), *map(watched_token, watch)], extra_env or {}, lock_wait_seconds
        )


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


class _Launch:
    """One child, from its order to its result."""

    def __init__(self, stage: Stage, build: Build, folder: Path, ranks: int) -> None:
        self._stage = stage
        self._build = build
        self._ranks = ranks
        self._spec = folder / "order.json"
        self._events = folder / "events.jsonl"
        self._result = folder / "result.json"
        self._log = build.work / LOG
        self._order = Order.of(
            stage, build, events=self._events, result=self._result, import_path=[p for p in sys.path if p]
        )

    def run(self, watch: Sequence[str], extra_env: Mapping[str, str], lock_wait_seconds: float) -> Built:
        self._order.write(self._spec)
        self._events.touch()
        supervisor: subprocess.Popen[bytes] | None = None
        name = ""
        with self._log.open("ab") as log:
            log.write(f"--- {self._build.asset} {datetime.now(UTC).isoformat(timespec='seconds')}\n".encode())
            log.flush()
            log_start = log.tell()
            tail = _Tail(self._events, self._build.report)
            try:
                with _held_back(SIGNALS):
                    supervisor = self._start(watch, extra_env, lock_wait_seconds, log.fileno())
                    name = token(supervisor.pid)
                while True:
                    code = _wait(supervisor, POLL_SECONDS)
                    tail.forward()
                    if code is not None:
                        break
            except BaseException:
                if supervisor is not None:
                    stop(supervisor, name)
                raise
            if code < 0:  # the supervisor itself was killed: see to it that nothing of it is left
                stop(supervisor, name)
        return self._outcome(code, _last_lines(self._log, log_start, LOG_LINES))

    def _start(
        self, watch: Sequence[str], extra_env: Mapping[str, str], lock_wait_seconds: float, log: int
    ) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "sft_pipeline.launch.supervise",
            *(part for watched in watch for part in ("--watch", watched)),
            "--lock",
            str(self._build.work.absolute() / LOCK),
            "--lock-wait",
            str(lock_wait_seconds),
            "--grace",
            str(GRACE_SECONDS),
            "--events",
            str(self._events.absolute()),
            "--",
            *self._child_command(),
        ]
        environment = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
        environment.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # else it warns whenever a data loader forks
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", **extra_env}
        # A session of its own: Ctrl-C in the terminal reaches this process only, which then ends the child in order.
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _child_command(self) -> list[str]:
        child = ["-m", "sft_pipeline.launch.child", str(self._spec.absolute())]
        if self._ranks == 1:
            return [sys.executable, *child]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(self._ranks),
            *child,
        ]

    # -- what came out -------------------------------------------------------------------------------------------

    def _outcome(self, code: int, log_tail: str) -> Built:
        name = self._build.asset or self._stage.name
        where = f"Its log: {self._log}" + (f"\n{log_tail}" if log_tail else "")
        if code == EXIT_LOCKED:
            raise SftError(
                f"{name}: another process still builds in {self._build.work}, and did not end in time. Stop it, or wait for it, and run again"
            )
        if code in (EXIT_STOPPED, EXIT_WATCHED_GONE):
            raise Interrupted(f"{name} was stopped from outside; running again resumes")
        if code == EXIT_CANNOT_START:
            raise SftError(f"{name}: the child process cannot be started. {where}")
        failures = self._failures()
        built = read_result(self._result)
        # One process that wrote its result had nothing left to do; a rank that did may have been left by the others.
        if isinstance(built, Built) and (code == 0 or self._ranks == 1):
            return built
        if code == 0:
            raise SftError(f"{name}: the child process ended without a result. {where}")
        killed_by = -code if code < 0 else code - 128 if code > 128 else self._rank_killed_by(log_tail)
        first = min(failures, key=lambda f: (f.exit_code == Interrupted.exit_code, f.time), default=None)
        if first is not None and (first.exit_code != Interrupted.exit_code or not killed_by):
            raise (
                first.error(f"{name}: ")
                if first.expected
                else SftError(f"{name} failed: {first.message}. {where}")
            )
        if killed_by:
            who = "the supervisor of the child process" if code < 0 else "the child process"
            raise SftError(
                f"{name}: {who} was killed by {_signal_name(killed_by)}{_hint(killed_by)}. Running again resumes. {where}"
            )
        kind = {e.exit_code: e for e in (InputError, BlockedError, Interrupted)}.get(code, SftError)
        raise kind(f"{name}: the child process ended with exit code {code}. {where}")

    def _failures(self) -> list[Failed]:
        found = [read_result(self._order.result_of(rank)) for rank in range(self._ranks)]
        return [f for f in found if isinstance(f, Failed)]

    def _rank_killed_by(self, log_tail: str) -> int:
        found = _RANK_KILLED.search(log_tail) if self._ranks > 1 else None
        return int(found[1]) if found else 0


def stop(supervisor: subprocess.Popen[bytes], name: str) -> None:
    """Ends a supervisor (of the token `name`) and everything below it: by asking, then by force.

    Whatever interrupts the asking (a second Ctrl-C), what follows is the force, not a process left behind.
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


class _Tail:
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
def _held_back(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Signals wait until the end of the block: an exception cannot come between starting a process and knowing its name.

    A process that is started here inherits this, and must let the signals through itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


@contextlib.contextmanager
def _launch_folder(work: Path) -> Iterator[Path]:
    """A folder for the files of one launch, named after this process; those of launchers that are gone are removed."""
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
    """The last lines of a log from an offset on; of a progress bar that rewrote its line, only the last state."""
    with log.open("rb") as stream:
        stream.seek(max(start, stream.seek(0, os.SEEK_END) - 64 * 1024))
        text = stream.read().decode(errors="replace")
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-count:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hint(number: int) -> str:
    if number == signal.SIGKILL:
        return " (most likely the system ran out of memory: try a smaller training.per_device_batch, or close other programs)"
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT):
        return " (a crash in native code: a driver, CUDA or an extension; see the end of the log)"
    return ""

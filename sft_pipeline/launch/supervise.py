"""Runs one command, and leaves no process of it behind.

    python -m sft_pipeline.launch.supervise --watch PID:START [--watch ...] --lock FILE -- COMMAND...

The command and everything it starts end when the command ends, when a watched process is gone, when this
program is asked to stop (SIGTERM, SIGINT, SIGHUP), or when it is killed itself. Descendants are found through
/proc, whatever session they moved to (each rank of torchrun has its own), and orphans stay in sight because
this process is a child subreaper. All get SIGTERM (and SIGCONT, so that a stopped one hears it), and after
`--grace` seconds SIGKILL.

The lock: one command at a time per FILE. The lock is released only when the last descendant is gone, so
whoever gets it next finds nobody writing. What a killed supervisor may have left (the kernel kills its
command, but not that command's own children) carries the lock's path in its environment, and is killed before
the next command starts.

Exit codes: that of the command (128 + N where signal N killed it); 121 the lock was not free in time; 122 a
watched process is gone; 123 asked to stop; 126 the command cannot be started. Not Linux: no /proc and no
subreaper, so only the command's own process group is ended, and the command outlives a supervisor that was
killed.
"""

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from sft_pipeline.launch import processes

EXIT_LOCKED = 121
EXIT_WATCHED_GONE = 122
EXIT_STOPPED = 123
EXIT_CANNOT_START = 126

SUPERVISOR_VARIABLE = "SFT_SUPERVISOR"  # pid:start of the supervisor, for every process below it
LOCK_VARIABLE = "SFT_SUPERVISOR_LOCK"  # the absolute path of the lock that it holds

POLL_SECONDS = 0.2
REPORT_SECONDS = 10.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop(Exception):
    """The command must not run (any longer)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Supervisor:
    """One command under supervision."""

    def __init__(self, watch: Sequence[str], grace_seconds: float, events: str | None) -> None:
        self._watch = watch
        self._grace = grace_seconds
        self._events = events
        self._asked: signal.Signals | None = None
        self._command: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._wake, wake_write = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake the wait
        # The launcher starts this program with the signals blocked, so that none gets lost before this line.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def run(self, command: Sequence[str], lock: str, lock_wait_seconds: float) -> int:
        """Waits for the lock, runs the command, ends what is left, and returns this program's exit code."""
        handle = None
        try:
            handle = self._take(lock, lock_wait_seconds)
            self._clear_leftovers(lock)
            self._start(command, lock)
            while self._status is None:
                self._pause(POLL_SECONDS)
                self._reap()
                if self._status is None:
                    self._must_go_on()
            return self._status
        except Stop as stop:
            self._report(f"{stop}" + ("; ending its processes" if self._command else ""))
            return stop.code
        finally:
            self._end_all()
            if handle is not None:
                os.close(handle)

    # The lock

    def _take(self, lock: str, wait_seconds: float) -> int:
        deadline = time.monotonic() + wait_seconds
        report_at = time.monotonic()
        while True:
            try:
                handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise Stop(EXIT_CANNOT_START, f"cannot open the lock {lock}: {error}") from None
            # Not the same file: the lock was deleted after it was opened here, so it no longer is the lock.
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(handle), os.stat(lock)):
                    # A full disk: then only the holder's pid is missing from the message.
                    with contextlib.suppress(OSError):
                        os.ftruncate(handle, 0)
                        os.pwrite(handle, processes.token().encode(), 0)
                    return handle
            holder = os.pread(handle, 64, 0).decode(errors="replace") or "unknown"
            os.close(handle)
            self._must_go_on()
            now = time.monotonic()
            if now >= deadline:
                raise Stop(
                    EXIT_LOCKED, f"{lock} is still held by process {holder} after {wait_seconds:.0f} s"
                )
            if now >= report_at:
                self._report(
                    f"waiting for the earlier process {holder} on {os.path.dirname(lock)} to be gone"
                )
                report_at = now + REPORT_SECONDS
            self._pause(POLL_SECONDS)

    def _clear_leftovers(self, lock: str) -> None:
        own = [os.getpid(), *processes.ancestors(os.getpid())]
        killed = processes.kill_carrying(LOCK_VARIABLE, lock, spare=own)
        if killed:
            self._report(f"killed what an earlier supervisor left behind: {', '.join(map(str, killed))}")

    # The command

    def _start(self, command: Sequence[str], lock: str) -> None:
        own = os.getpid()

        def die_with_supervisor() -> None:
            processes.set_parent_death_signal()
            if os.getppid() != own:  # it died before the line above
                os._exit(EXIT_STOPPED)

        environment = os.environ | {SUPERVISOR_VARIABLE: processes.token(), LOCK_VARIABLE: lock}
        try:
            self._command = subprocess.Popen(
                command, env=environment, start_new_session=True, preexec_fn=die_with_supervisor
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Stop(EXIT_CANNOT_START, f"cannot start {command[0]}: {error}") from None

    def _reap(self) -> None:
        """Takes the status of every child that has ended: the command, and orphans that came here."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._command is not None and pid == self._command.pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = self._command.returncode = code if code >= 0 else 128 - code

    def _end_all(self) -> None:
        """Asks every descendant to end, kills those that do not, and returns when there is none."""
        asked: set[int] = set()
        kill_at = time.monotonic() + self._grace
        report_at = kill_at + REPORT_SECONDS
        while True:
            self._reap()
            left = self._descendants()
            if not left:
                return
            now = time.monotonic()
            for pid in left:
                if now >= kill_at:
                    processes.send(pid, signal.SIGKILL)
                elif pid not in asked:
                    asked.add(pid)
                    processes.send(pid, signal.SIGTERM, signal.SIGCONT)
            # Uninterruptible in the kernel: a device or a network disk that does not answer.
            if now >= report_at:
                self._report(
                    f"still waiting for {', '.join(map(str, left))}, which the kernel has not ended yet"
                )
                report_at = now + REPORT_SECONDS
            self._pause(0.05)

    def _descendants(self) -> list[int]:
        if processes.LINUX:
            return processes.descendants(os.getpid())
        if self._command is None:
            return []
        group = -self._command.pid  # as kill(2) takes a process group
        try:
            os.kill(group, 0)
        except (ProcessLookupError, PermissionError):
            return []
        return [group]

    # Waiting

    def _must_go_on(self) -> None:
        if self._asked is not None:
            raise Stop(EXIT_STOPPED, f"asked to stop ({self._asked.name})")
        for watched in self._watch:
            if not processes.is_running(watched):
                raise Stop(EXIT_WATCHED_GONE, f"the watched process {watched} is gone")

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._asked = signal.Signals(number)

    def _pause(self, seconds: float) -> None:
        """Sleeps; any signal, of a child's end too, cuts it short."""
        if select.select([self._wake], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 4096)

    def _report(self, message: str) -> None:
        """One line on stderr (the child's log), and one for whoever reads the events."""
        # Nobody may be there to read it: the one who listened can be what is gone, and the disk can be full.
        with contextlib.suppress(OSError):
            print(f"supervise: {message}", file=sys.stderr, flush=True)
        if self._events:
            event: dict[str, object] = {"kind": "log", "message": message, "level": "warning"}
            event |= {"time": time.time(), "pid": os.getpid()}
            with contextlib.suppress(OSError), open(self._events, "a", encoding="utf-8") as stream:
                # A killed child can have left half a line: end it first.
                stream.write("\n" + json.dumps(event) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--watch", action="append", default=[], metavar="PID:START", help="the command ends with it")
    option("--lock", required=True, metavar="FILE", help="held while any process of the command lives")
    option("--lock-wait", type=float, default=60.0, metavar="SECONDS", help="for the lock (default 60)")
    option("--grace", type=float, default=2.0, metavar="SECONDS", help="SIGTERM to SIGKILL (default 2)")
    option("--events", metavar="FILE", help="where to report, as JSON lines, what is waited for")
    option("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(arguments)
    for watched in options.watch:
        try:
            processes.parse(watched)
        except ValueError:
            parser.error(f"--watch {watched}: give PID:START")
    supervisor = Supervisor(options.watch, options.grace, options.events)
    processes.become_subreaper()
    return supervisor.run(options.command, os.path.abspath(options.lock), options.lock_wait)


if __name__ == "__main__":
    sys.exit(main())

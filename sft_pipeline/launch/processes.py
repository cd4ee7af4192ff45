"""Identity, descendants and signals of processes. Standard library only: the supervisor must start fast.

A process is named by its *token* `pid:start`, the start time (in clock ticks since boot) from
/proc/<pid>/stat: a recycled pid has another start time. Without /proc (not Linux) the start is 0 and a token
is no better than a pid, and descendants cannot be listed.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

PROC = Path("/proc")
LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_GONE = frozenset("ZXx")  # zombie and dead: they run nothing any more


def token(pid: int | None = None) -> str:
    """The token of a process of this machine, by default of this one.

    Raises:
        ProcessLookupError: There is no such process.
    """
    pid = os.getpid() if pid is None else pid
    if not LINUX:
        return f"{pid}:0"
    found = _stat(pid)
    if found is None:
        raise ProcessLookupError(f"no process {pid}")
    return f"{pid}:{found[2]}"


def parse(token: str) -> tuple[int, int]:
    """(pid, start) of a token.

    Raises:
        ValueError: It is not of the form `pid:start`.
    """
    pid, start = token.split(":")
    return int(pid), int(start)


def is_running(token: str) -> bool:
    """Whether that very process still runs. A zombie does not: only its status has not been collected."""
    pid, start = parse(token)
    if not LINUX:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    found = _stat(pid)
    return found is not None and found[0] not in _GONE and found[2] == start


def descendants(root: int) -> list[int]:
    """Every process below `root`, zombies included, in any session or process group; parents first."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        found = _stat(pid)
        if found is not None:
            children.setdefault(found[1], []).append(pid)
    below: list[int] = []
    todo = [root]
    while todo:
        new = children.get(todo.pop(0), [])
        below += new
        todo += new
    return below


def ancestors(pid: int) -> list[int]:
    """The parents of a process up to the first one."""
    above: list[int] = []
    while (found := _stat(pid)) is not None and found[1] > 0:
        pid = found[1]
        above.append(pid)
    return above


def carrying(variable: str, value: str) -> list[int]:
    """The running processes that were started with this environment variable set to this value.

    A variable is inherited, so this finds the descendants of a process that is gone, orphans that have no
    traceable parent any more included. Only processes of the same user are seen.
    """
    wanted = f"{variable}={value}".encode()
    return [
        pid
        for pid in _pids()
        if wanted in _environ(pid).split(b"\0") and (found := _stat(pid)) and found[0] not in _GONE
    ]


def send(pid: int, *signals: signal.Signals) -> None:
    """Sends signals to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        for s in signals:
            os.kill(pid, s)


def kill_carrying(
    variable: str, value: str, spare: Collection[int] = (), wait_seconds: float = 3.0
) -> list[int]:
    """Kills (SIGKILL) every process that carries the variable, until none is left or the time is over.

    Returns:
        The pids that were killed.
    """
    killed: dict[int, None] = {}
    deadline = time.monotonic() + wait_seconds
    while True:
        left = [pid for pid in carrying(variable, value) if pid != os.getpid() and pid not in spare]
        for pid in left:
            send(pid, signal.SIGKILL)
            killed[pid] = None
        if not left or time.monotonic() >= deadline:
            return list(killed)
        time.sleep(0.05)


def become_subreaper() -> bool:
    """Orphaned descendants become this process's children instead of init's, so that none gets out of sight.

    Returns:
        Whether the system can do it (Linux).
    """
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_parent_death_signal(number: signal.Signals = signal.SIGKILL) -> bool:
    """The kernel sends this process a signal when its parent dies, even while it is stopped or in a C loop.

    Strictly, when the parent's *thread* that started it ends: start such children from the main thread.
    """
    return _prctl(_PR_SET_PDEATHSIG, int(number))


def _prctl(option: int, value: int) -> bool:
    if not LINUX:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0


def _pids() -> Iterator[int]:
    if LINUX:
        for name in os.listdir(PROC):
            if name.isdigit():
                yield int(name)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """(state, parent's pid, start time) of a process, or None where it is gone. See proc_pid_stat(5)."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rfind(")") + 2 :].split()  # the command's name, in parentheses, may hold anything
    return (fields[0], int(fields[1]), int(fields[19])) if len(fields) > 19 else None


def _environ(pid: int) -> bytes:
    try:
        return (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return b""

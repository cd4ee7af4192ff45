"""Kills: which process is killed and when, at the moment that was planned."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil

from resuming.attempt import start, train

POLL = 0.0005
GIVE_UP = 600.0
PARTIAL = "work/*/.checkpoint-*.partial"
SPEED_LOG = "work/*/throughput.jsonl"  # one line per update, as it is made
LAST_UPDATES = 0.1  # share of the training before whose end the last kill comes
VICTIMS = ("trainer", "trainer", "trainer", "supervisor", "whole run")


@dataclass(frozen=True)
class Pace:
    """How long things took in the run that was not killed, in seconds."""

    start_up: float
    update: float
    save: float
    updates: int


@dataclass(frozen=True)
class PlannedKill:
    """One kill, as drawn.

    Attributes:
        moment: "start-up": uniformly between the start of the attempt and its first update. "training": an
            update that is drawn uniformly, and a uniform moment after it. "save": while the first checkpoint
            after that update is being written, at a uniform moment of it.
        victim: "trainer": the process that trains. "supervisor": the one above it. "whole run": the one that
            logs to MLflow.
        after: The kill comes after this update.
        fraction: Where in the span of the moment, 0 to 1.
    """

    moment: str
    victim: str
    after: int
    fraction: float


@dataclass(frozen=True)
class Kill:
    """One kill, as it came.

    Attributes:
        seconds: Since the attempt began.
        reached: The last update before it, of any attempt's; 0 before the first.
        saving: The checkpoint that was being written, "" where none was.
        resumed_at: Where the training went on after it; None until an attempt has come so far.
    """

    planned: PlannedKill
    seconds: float
    reached: int
    saving: str
    resumed_at: int | None = None


class Missed(RuntimeError):
    """The attempt was over before the moment came."""


def plan_kills(kills: int, seed: int, updates: int) -> list[PlannedKill]:
    """A third in saves, a tenth in start-ups, the rest in training; later kills come after later updates."""
    random_ = random.Random(seed)
    saves, starts = max(1, kills // 3), kills // 10
    moments = ["save"] * saves + ["start-up"] * starts + ["training"] * (kills - saves - starts)
    random_.shuffle(moments)
    after = sorted(random_.randint(1, int(updates * (1 - LAST_UPDATES))) for _ in moments)
    return [
        # In a save it is the trainer that is stopped first, to be sure that it is one.
        PlannedKill(m, "trainer" if m == "save" else random_.choice(VICTIMS), u, random_.random())
        for m, u in zip(moments, after, strict=True)
    ]


def run_undisturbed(home: Path, kind: str, rows: Path, log: Path) -> Pace:
    """A run that is left alone.

    Raises:
        RuntimeError: It failed; with the end of its log.
    """
    began = time.monotonic()
    process = start(train, str(home), kind, str(rows), str(log))
    first, last, saves, saving, seen = 0.0, 0.0, [], 0.0, 0
    while process.is_alive():
        now, step = time.monotonic(), reached(home, seen)
        if step > seen:
            first, last, seen = first or now, now, step
        if (partial(home) is not None) != bool(saving):
            if saving:
                saves.append(now - saving)
            saving = 0.0 if saving else now
        time.sleep(POLL)
    if process.exitcode:
        raise RuntimeError(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    typical = sorted(saves)[len(saves) // 2] if saves else 0.02
    return Pace(first - began, (last - first) / max(1, seen - 1), typical, seen)


def kill_attempt(home: Path, kind: str, rows: Path, log: Path, planned: PlannedKill, pace: Pace) -> Kill:
    """One attempt, killed at its moment.

    Raises:
        Missed: It ended by itself before.
    """
    before = reached(home)
    began, since = time.monotonic(), time.time()
    process = start(train, str(home), kind, str(rows), str(log))
    assert process.pid
    run = psutil.Process(process.pid)
    saving = ""
    if planned.moment == "start-up":
        _until(lambda: time.monotonic() - began > planned.fraction * pace.start_up, process)
    else:
        # Training cuts the speed log back to the resumed update; before that, it shows the last attempt.
        _until(lambda: find(run, "trainer") is not None, process)
        _until(lambda: _began(log), process)
        _until(lambda: reached(home) >= planned.after, process)
        if planned.moment == "save":
            saving = _stop_in_save(home, since, run, process, planned.fraction * pace.save)
        else:
            time.sleep(planned.fraction * 2 * pace.update)
    victim = run if planned.victim == "whole run" else find(run, planned.victim)
    if not process.is_alive():
        raise Missed(f"the attempt ended before its kill:\n{log.read_text()[-2000:]}")
    (victim or run).kill()
    kill = Kill(planned, time.monotonic() - began, max(before, reached(home)), saving)
    # Where another process was killed, the trainer had a moment more, in which it may have finished its save.
    if not saving and planned.victim == "trainer" and (found := partial(home, since)):
        kill = Kill(planned, kill.seconds, kill.reached, _name(found))
    process.join()
    _gone(home)
    return kill


def reached(home: Path, default: int = 0) -> int:
    """The last update in the speed log."""
    for path in home.glob(SPEED_LOG):
        lines = path.read_bytes().splitlines()
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:  # being written
                continue
    return default


def partial(home: Path, since: float = 0.0) -> Path | None:
    """The checkpoint being written; what was left unfinished before `since` (Unix seconds) does not count."""
    for path in home.glob(PARTIAL):
        try:
            if path.stat().st_mtime > since:
                return path
        except FileNotFoundError:  # it was finished between the listing and this call
            continue
    return None


def resumed_at(log: Path) -> int | None:
    """Where an attempt went on, by its log; None where it was killed before."""
    found = re.findall(r"resuming after update (\d+)", log.read_text())
    return int(found[-1]) if found else 0 if _began(log) else None


def find(run: psutil.Process, who: str) -> psutil.Process | None:
    """The trainer or the supervisor below an attempt; None where it is not there yet."""
    name = {"trainer": "sft_pipeline.launch.child", "supervisor": "sft_pipeline.launch.supervise"}[who]
    try:
        for process in run.children(recursive=True):
            command = process.cmdline()
            if command[1:3] == ["-m", name]:
                return process
    except psutil.Error:
        pass
    return None


def _began(log: Path) -> bool:
    """The attempt has logged what it trains, after which the speed log is its own."""
    return "parameters are trained" in log.read_text()


def _stop_in_save(
    home: Path, since: float, run: psutil.Process, process: ForkServerProcess, delay: float
) -> str:
    """Stops the trainer while a checkpoint is written; where the save was over sooner, at the next one."""
    while True:
        _until(lambda: partial(home, since) is not None, process)
        time.sleep(delay)
        trainer = find(run, "trainer")
        if trainer is None:
            raise Missed("the trainer ended before its save")
        trainer.send_signal(signal.SIGSTOP)
        while trainer.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(POLL)
        found = partial(home, since)
        if found:
            return _name(found)
        trainer.send_signal(signal.SIGCONT)
        delay /= 2


def _name(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".partial")


def _until(condition: Callable[[], bool], process: ForkServerProcess) -> None:
    deadline = time.monotonic() + GIVE_UP
    while not condition():
        if not process.is_alive():
            raise Missed("the attempt ended before its kill")
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened for {GIVE_UP:.0f} s")
        time.sleep(POLL)


def _gone(home: Path) -> None:
    """Waits until no process of the store is left, as the product promises within seconds."""
    deadline = time.monotonic() + 30
    while left := [p.pid for p in psutil.process_iter(["cmdline"]) if _belongs(p, home)]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes {left} are left behind")
        time.sleep(0.05)


def _belongs(process: psutil.Process, home: Path) -> bool:
    if process.pid == os.getpid() or process.info["cmdline"] is None:
        return False
    return any(str(home / "work") in part for part in process.info["cmdline"])

"""Kill -9, again and again: one LoRA run and one full run, each against the same run that nobody touched.

    python bench/kills.py                     20 kills of each, seed 0: some minutes
    python bench/kills.py --kills 3 --seed 7 --kinds lora

A run is the stage trained_checkpoints as an orchestrator runs it: against a store, with an MLflow run, in a
supervised child process. After each SIGKILL it is started again and goes on from the last whole checkpoint. A
third of the kills land inside the writing of a checkpoint (the trainer is stopped there first, so that it is
certain), a tenth in a start-up, and the rest at random moments of the training; except in a save, the victim
is drawn too: the trainer, its supervisor, or the whole run with what logs to MLflow. Afterwards: the same
weights bit for bit, no row trained twice or skipped, and one continuous curve in MLflow under one run id.
Exit code 1 where anything differs.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from report import machine, table
from resuming import attempt, killing
from resuming.attempt import prepare, start, train
from resuming.compare import compare


def main() -> int:
    options = _options()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(folder)
        attempt.write_rows(root)
        prepared = root / "prepared"
        log = root / "prepare.log"
        _finish(start(prepare, str(prepared), options.kinds, str(root), str(log)), log)
        good = [_one(kind, root, prepared, options.kills, options.seed) for kind in options.kinds]
    print(f"\nload after: {os.getloadavg()[0]:.1f}")
    return 0 if all(good) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=attempt.KINDS, default=list(attempt.KINDS))
    return parser.parse_args()


def _one(kind: str, root: Path, prepared: Path, kills: int, seed: int) -> bool:
    """One kind: left alone, killed, compared. Whether nothing differs."""
    whole, killed = root / f"{kind}-whole", root / f"{kind}-killed"
    for home in (whole, killed):
        shutil.copytree(prepared, home)
    pace = killing.run_undisturbed(whole, kind, root, root / f"{kind}-whole.log")
    print(
        f"\n### {kind}: {pace.updates} updates of {pace.update * 1000:.0f} ms, a checkpoint every "
        f"{attempt.TRAINING['save_steps']} (written in {pace.save * 1000:.0f} ms), "
        f"start-up {pace.start_up:.1f} s, seed {seed}\n"
    )
    began = time.monotonic()
    kills_done = _kill(kind, root, killed, killing.plan_kills(kills, seed, pace.updates), pace)
    print(_show(kills_done), flush=True)
    saves = sum(bool(s.saving) for s in kills_done)
    findings = compare(whole, killed, kind, root)
    lines = [[f.what, "yes" if f.holds else "NO", f.found] for f in findings]
    seconds = time.monotonic() - began
    print(f"\n{len(kills_done)} kills, {saves} of them inside a checkpoint's writing, in {seconds:.0f} s\n")
    print(table(("", "holds", "found"), lines), flush=True)
    return all(f.holds for f in findings)


def _kill(
    kind: str, root: Path, home: Path, plan: list[killing.PlannedKill], pace: killing.Pace
) -> list[killing.Kill]:
    """The kills, and the last attempt, which is left alone. A kill learns where a later attempt went on."""
    kills_done: list[killing.Kill] = []
    for number, planned in enumerate([*plan, None]):
        log = root / f"{kind}-{number}.log"
        log.touch()
        if planned is not None:
            kills_done.append(killing.kill_attempt(home, kind, root, log, planned, pace))
        else:
            _finish(start(train, str(home), kind, str(root), str(log)), log)
        resumed, earlier = killing.resumed_at(log), kills_done[:number]
        if resumed is not None:
            earlier = [replace(s, resumed_at=resumed) if s.resumed_at is None else s for s in earlier]
        kills_done = earlier + kills_done[number:]
    return kills_done


def _show(kills_done: list[killing.Kill]) -> str:
    rows = [
        [
            str(number),
            s.planned.victim,
            f"in the save of {s.saving}" if s.saving else s.planned.moment,
            f"{s.seconds:.1f}",
            str(s.reached),
            str(s.resumed_at),
        ]
        for number, s in enumerate(kills_done, 1)
    ]
    return table(
        ("kill", "killed", "moment", "seconds after start", "update reached", "resumed after update"), rows
    )


def _finish(process: ForkServerProcess, log: Path) -> None:
    """Waits for a process that must not fail."""
    process.join()
    if process.exitcode:
        sys.exit(f"failed:\n{log.read_text()[-4000:]}")


if __name__ == "__main__":
    sys.exit(main())

"""Kill -9, again and again: one LoRA run and one full run, each against the same run that nobody touched.

    python bench/kills.py                     20 kills of each, seed 0: some minutes
    python bench/kills.py --kills 3 --seed 7 --kinds lora

A run is the stage trained_checkpoints as an orchestrator runs it: against a store, with an MLflow run, in a supervised
child process. After each SIGKILL it is started again and goes on from the last whole checkpoint. A third of the kills
land inside the writing of a checkpoint (the trainer is stopped there first, so that it is certain), a tenth in a
start-up, and the rest at random moments of the training; except in a save, the victim is drawn too: the trainer, its supervisor, or
the whole run with what tells MLflow. Afterwards: the same weights bit for bit, no row trained twice or skipped, and
one continuous curve in MLflow under one run id. Exit code 1 where anything differs.
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

from plane.report import machine, table
from resuming import branch, strike, verdict
from resuming.attempt import prepare, start, train


def main() -> int:
    options = _options()
    os.environ["OMP_WAIT_POLICY"] = "passive"
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(folder)
        branch.write_rows(root)
        prepared = root / "prepared"
        _finish(
            start(prepare, str(prepared), options.kinds, str(root), str(root / "prepare.log")),
            root / "prepare.log",
        )
        good = [_one(kind, root, prepared, options.kills, options.seed) for kind in options.kinds]
    print(f"\nload after: {os.getloadavg()[0]:.1f}")
    return 0 if all(good) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=branch.KINDS, default=list(branch.KINDS))
    return parser.parse_args()


def _one(kind: str, root: Path, prepared: Path, kills: int, seed: int) -> bool:
    """One kind: left alone, killed, judged. Whether all is well."""
    whole, killed = root / f"{kind}-whole", root / f"{kind}-killed"
    for home in (whole, killed):
        shutil.copytree(prepared, home)
    pace = strike.watch(whole, kind, root, root / f"{kind}-whole.log")
    print(
        f"\n### {kind}: {pace.updates} updates of {pace.update * 1000:.0f} ms, a checkpoint every "
        f"{branch.TRAINING['save_steps']} (written in {pace.save * 1000:.0f} ms), start-up {pace.start_up:.1f} s, seed {seed}\n"
    )
    began = time.monotonic()
    struck = _kill(kind, root, killed, strike.draw(kills, seed, pace.updates), pace)
    print(_show(struck), flush=True)
    saves = sum(bool(s.saving) for s in struck)
    findings = verdict.judge(whole, killed, kind, root)
    lines = [[f.what, "yes" if f.holds else "NO", f.found] for f in findings]
    print(
        f"\n{len(struck)} kills, {saves} of them inside the writing of a checkpoint, in {time.monotonic() - began:.0f} s\n"
    )
    print(table(("", "holds", "found"), lines), flush=True)
    return all(f.holds for f in findings)


def _kill(
    kind: str, root: Path, home: Path, strikes: list[strike.Strike], pace: strike.Pace
) -> list[strike.Struck]:
    """The kills, and the last attempt, which is left alone. A kill learns where a later attempt went on."""
    struck: list[strike.Struck] = []
    for number, planned in enumerate([*strikes, None]):
        log = root / f"{kind}-{number}.log"
        log.touch()
        if planned is not None:
            struck.append(strike.attack(home, kind, root, log, planned, pace))
        else:
            _finish(start(train, str(home), kind, str(root), str(log)), log)
        resumed, earlier = strike.resumed_at(log), struck[:number]
        if resumed is not None:
            earlier = [replace(s, resumed_at=resumed) if s.resumed_at is None else s for s in earlier]
        struck = earlier + struck[number:]
    return struck


def _show(struck: list[strike.Struck]) -> str:
    rows = [
        [
            str(number),
            s.strike.victim,
            f"in the save of {s.saving}" if s.saving else s.strike.moment,
            f"{s.seconds:.1f}",
            str(s.reached),
            str(s.resumed_at),
        ]
        for number, s in enumerate(struck, 1)
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

"""All systems on one setting, each measurement in a process of its own, taking turns, and the report."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from report import mib, table

from sft_pipeline.training.flops import peak_flops, utilization
from training.setting import Setting, write_rows

OURS = "sft_pipeline"
BENCH = Path(__file__).resolve().parents[1]
MIB = 1 << 20
TIMES_AS_FAST = 2.0  # wanted where the vocabulary is wide; elsewhere: not slower
HEADER = (
    "",
    "supervised tokens/s",
    "tokens/s",
    "CPU s/update",
    "first update s",
    "peak MiB",
    "loss differs",
    "times as fast",
    "in CPU time",
    "memory",
)


@dataclass(frozen=True)
class Measured:
    """What one training took.

    Attributes:
        first: Seconds from the ready process to the end of the first update: model, trainer, update.
        seconds: Wall seconds of each later update.
        cpu_seconds: Of all threads, for each later update: what remains comparable on a busy machine.
        losses: Of every update.
        peak: Bytes: the GPU's, or the resident size of the process.
        before: The same when the process was ready.
        threads: Of torch.
        layout: Of the feed, of this pipeline only.
        flops: That an update must compute.
        attention: The implementation that ran.
    """

    first: float
    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]
    peak: float
    before: float
    threads: int
    layout: str
    flops: float
    attention: str


def measure(system: str, setting: Setting, rows: Path, updates: int) -> Measured:
    """Runs a system in a fresh process.

    Raises:
        RuntimeError: It failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = {"system": system, "setting": asdict(setting), "rows": str(rows), "updates": updates}
        done = subprocess.run(
            [sys.executable, "-m", "training.systems", str(result)],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=BENCH,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"},
        )
        if done.returncode or not result.is_file():
            raise RuntimeError(
                f"{system} on {setting.name} failed with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        return Measured(**json.loads(result.read_text()))


Rounds = dict[str, list[Measured | None]]


@dataclass(frozen=True)
class Compared:
    """The measurements of one setting.

    Attributes:
        per_update: tokens and supervised of an update (`write_rows`).
        rounds: Per system one measurement a round; None where one was left out because another of the peer's
            configurations had been faster.
        device: The GPU's name, or None.
    """

    setting: Setting
    per_update: dict[str, float]
    rounds: Rounds
    device: str | None

    @property
    def best(self) -> str:
        """The peer's fastest configuration of the first round."""
        return min((s for s in self.rounds if s != OURS), key=lambda s: _seconds(self.rounds[s][0]))

    def ratio(self, system: str, figure: Any = None) -> float:
        """How many times as fast as a system this pipeline is: the median over the rounds' own ratios."""
        figure = figure or _seconds
        pairs = zip(self.rounds[OURS], self.rounds[system])
        return statistics.median(figure(p) / figure(o) for o, p in pairs if o and p)

    def memory(self, system: str) -> float:
        """This pipeline's peak over the system's."""
        return _peak(self.rounds[OURS]) / _peak(self.rounds[system])

    def loss_difference(self, system: str) -> float:
        """The largest difference of an update's loss to this pipeline's."""
        own, other = self.rounds[OURS][0], self.rounds[system][0]
        assert own and other
        return max(abs(a - b) for a, b in zip(own.losses, other.losses, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {
            "setting": asdict(self.setting),
            "per_update": self.per_update,
            "device": self.device,
            "best_of_trl": self.best,
            "rounds": {s: [asdict(m) if m else None for m in found] for s, found in self.rounds.items()},
        }


def compare(
    setting: Setting, systems: Sequence[str], *, updates: int, rounds: int, device: str | None
) -> Compared:
    """All systems in the first round; then this pipeline and the peer's fastest, every other one backwards.

    Args:
        updates: Of a training; the first one is not in the speed.
    """
    with tempfile.TemporaryDirectory() as folder:
        per_update = write_rows(setting, updates, Path(folder))
        found: Rounds = {system: [measure(system, setting, Path(folder), updates)] for system in systems}
        compared = Compared(setting, per_update, found, device)
        pair = (OURS, compared.best)
        for turn in range(1, rounds):
            for system in reversed(pair) if turn % 2 else pair:
                found[system].append(measure(system, setting, Path(folder), updates))
            for system in set(systems) - set(pair):
                found[system].append(None)
    return compared


def show(compared: Compared) -> str:
    """One line per system: medians over the rounds, ratios within a round."""
    header = [*HEADER, *(["MFU"] if _mfu_known(compared) else [])]
    return table(header, [_line(compared, system) for system in compared.rounds])


def _line(compared: Compared, system: str) -> list[str]:
    runs = [m for m in compared.rounds[system] if m]
    seconds, per_update = statistics.median(map(_seconds, runs)), compared.per_update
    own = system == OURS
    line = [
        system + (" (best)" if system == compared.best else ""),
        f"{per_update['supervised'] / seconds:,.0f}",
        f"{per_update['tokens'] / seconds:,.0f}",
        f"{statistics.median(map(_cpu, runs)):.2f}",
        f"{statistics.median(m.first for m in runs):.1f}",
        mib(_peak(runs) / MIB),
        "" if own else f"{compared.loss_difference(system):.0e}",
        "" if own else f"{compared.ratio(system):.2f}",
        "" if own else f"{compared.ratio(system, _cpu):.2f}",
        "" if own else f"{compared.memory(system):.2f}",
    ]
    return line + ([f"{_mfu(compared, runs[0], seconds):.1%}"] if _mfu_known(compared) else [])


def target(compared: Compared) -> list[str]:
    """Setting, the peer's best, the ratios, the target, and whether it is met."""
    best, wide = compared.best, compared.setting.wide
    speed, memory = compared.ratio(best), compared.memory(best)
    met = speed >= (TIMES_AS_FAST if wide else 1.0) and (memory < 1 or not wide)
    return [
        compared.setting.name,
        best,
        f"{speed:.2f}",
        f"{compared.ratio(best, _cpu):.2f}",
        f"{memory:.2f}",
        f"{TIMES_AS_FAST:g} times as fast in less memory" if wide else "not slower",
        "yes" if met else "NO",
    ]


def summary(found: Sequence[Compared]) -> str:
    header = ("", "TRL's best", "times as fast", "in CPU time", "memory", "target", "met")
    return table(header, [target(c) for c in found])


def losses(compared: Compared) -> str:
    """The losses of the updates, of this pipeline and of the peer's best."""
    return "\n".join(
        f"losses of {system}: {', '.join(f'{loss:.6f}' for loss in found[0].losses)}"
        for system, found in compared.rounds.items()
        if system in (OURS, compared.best) and found[0]
    )


def _seconds(run: Measured | None) -> float:
    assert run
    return statistics.median(run.seconds)


def _cpu(run: Measured | None) -> float:
    assert run
    return statistics.median(run.cpu_seconds)


def _peak(runs: Sequence[Measured | None]) -> float:
    return max(run.peak for run in runs if run)


def _mfu_known(compared: Compared) -> bool:
    return compared.device is not None and peak_flops(compared.device) is not None


def _mfu(compared: Compared, run: Measured, seconds: float) -> float:
    return utilization(run.flops, seconds, compared.device or "") or 0.0

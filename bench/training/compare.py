"""All sides on one setting, taking turns, and what came of it."""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plane.report import mib, table

from sft_pipeline.training.flops import peak_flops, utilization
from training import rows
from training.measure import Measured, measure
from training.setting import Setting

OURS = "sft_pipeline"
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

Rounds = dict[str, list[Measured | None]]


@dataclass(frozen=True)
class Compared:
    """The measurements of one setting.

    Attributes:
        per_update: tokens and supervised of an update (`rows.write`).
        rounds: Per side one measurement a round; None where a side was left out because another of the peer's
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

    def ratio(self, side: str, figure: Any = None) -> float:
        """How many times as fast as a side this pipeline is: the median over the rounds' own ratios."""
        figure = figure or _seconds
        pairs = zip(self.rounds[OURS], self.rounds[side])
        return statistics.median(figure(p) / figure(o) for o, p in pairs if o and p)

    def memory(self, side: str) -> float:
        """This pipeline's peak over the side's."""
        return _peak(self.rounds[OURS]) / _peak(self.rounds[side])

    def loss_difference(self, side: str) -> float:
        """The largest difference of an update's loss to this pipeline's."""
        own, other = self.rounds[OURS][0], self.rounds[side][0]
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
    setting: Setting, sides: Sequence[str], *, updates: int, rounds: int, device: str | None
) -> Compared:
    """The first round has all sides; later ones this pipeline and the peer's fastest, every other round backwards.

    Args:
        updates: Of a training; the first one is not in the speed.
    """
    with tempfile.TemporaryDirectory() as folder:
        per_update = rows.write(setting, updates, Path(folder))
        found: Rounds = {side: [measure(side, setting, Path(folder), updates)] for side in sides}
        compared = Compared(setting, per_update, found, device)
        pair = (OURS, compared.best)
        for turn in range(1, rounds):
            for side in reversed(pair) if turn % 2 else pair:
                found[side].append(measure(side, setting, Path(folder), updates))
            for side in set(sides) - set(pair):
                found[side].append(None)
    return compared


def show(compared: Compared) -> str:
    """One line per side: medians over the rounds, ratios within a round."""
    header = [*HEADER, *(["MFU"] if _mfu_known(compared) else [])]
    return table(header, [_line(compared, side) for side in compared.rounds])


def _line(compared: Compared, side: str) -> list[str]:
    runs = [m for m in compared.rounds[side] if m]
    seconds, per_update = statistics.median(map(_seconds, runs)), compared.per_update
    own = side == OURS
    line = [
        side + (" (best)" if side == compared.best else ""),
        f"{per_update['supervised'] / seconds:,.0f}",
        f"{per_update['tokens'] / seconds:,.0f}",
        f"{statistics.median(map(_cpu, runs)):.2f}",
        f"{statistics.median(m.first for m in runs):.1f}",
        mib(_peak(runs) / MIB),
        "" if own else f"{compared.loss_difference(side):.0e}",
        "" if own else f"{compared.ratio(side):.2f}",
        "" if own else f"{compared.ratio(side, _cpu):.2f}",
        "" if own else f"{compared.memory(side):.2f}",
    ]
    return line + ([f"{_mfu(compared, runs[0], seconds):.1%}"] if _mfu_known(compared) else [])


def judge(compared: Compared) -> list[str]:
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
    return table(header, [judge(c) for c in found])


def losses(compared: Compared) -> str:
    """The losses of the updates, of this pipeline and of the peer's best."""
    return "\n".join(
        f"losses of {side}: {', '.join(f'{loss:.6f}' for loss in found[0].losses)}"
        for side, found in compared.rounds.items()
        if side in (OURS, compared.best) and found[0]
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

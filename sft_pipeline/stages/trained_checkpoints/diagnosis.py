"""What the curves say, in words. Pure functions over (step, value) lists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

Curve = list[tuple[int, float]]

SPIKE_WINDOW = 20
SPIKE_FACTOR = 8.0
TOO_FAST = 0.01


@dataclass(frozen=True)
class Finding:
    """`kind` is one of not_decreasing, near_zero_too_fast, diverging, spike, overfitting, not_finite."""

    kind: str
    step: int
    words: str
    blocks: list[int] = field(default_factory=list)
    row_ids: list[str] = field(default_factory=list)
    replay: str = ""


@dataclass(frozen=True)
class Members:
    """What an update is made of, and the command that shows it row by row."""

    blocks: list[int]
    row_ids: list[str]
    replay: str

    @property
    def words(self) -> str:
        return f"blocks {_first(self.blocks)}, rows {_first(self.row_ids)}. Look at it with `{self.replay}`"


def _first(values: Sequence[object], most: int = 4) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + more


def diagnose(loss: Curve, val_loss: Curve, members: Callable[[int], Members] | None = None) -> list[Finding]:
    """Everything that looks wrong; empty when nothing does.

    Args:
        members: Of the update that made a step, to name what caused a spike.
    """
    return [*_slope(loss), *_too_fast(loss), *_spikes(loss, members), *_overfitting(loss, val_loss)]


def _slope(loss: Curve) -> list[Finding]:
    """Compares the first and the last tenth (three updates at least); the level must fall by two percent."""
    if len(loss) < 10:
        return []
    n = max(3, len(loss) // 10)
    first, last = mean(v for _, v in loss[:n]), mean(v for _, v in loss[-n:])
    step = loss[-1][0]
    if last > 1.2 * first:
        return [
            Finding(
                "diverging",
                step,
                f"the loss rose from {first:.3f} to {last:.3f}: the learning rate is too high, or the labels are wrong. Try a third of the learning rate",
            )
        ]
    if last > 0.98 * first and first > 0.05:
        return [
            Finding(
                "not_decreasing",
                step,
                f"the loss stayed at {last:.3f} (it began at {first:.3f}): the learning rate is too low, nothing is trained, or there is nothing to learn in the labels",
            )
        ]
    return []


def _too_fast(loss: Curve) -> list[Finding]:
    early = loss[: max(1, len(loss) // 5)]
    if len(loss) < 20 or loss[0][1] < 0.1:
        return []
    for step, value in early:
        if value < TOO_FAST:
            return [
                Finding(
                    "near_zero_too_fast",
                    step,
                    f"the loss was {value:.4f} after {step} updates: the answers may stand in the prompts, or rows repeat. Look at them with `sft inspect`",
                )
            ]
    return []


def _spikes(loss: Curve, members: Callable[[int], Members] | None, most: int = 5) -> list[Finding]:
    """An update whose loss is far above those before it: eight median deviations, and half again their median."""
    found = []
    for i in range(SPIKE_WINDOW, len(loss)):
        before = [v for _, v in loss[i - SPIKE_WINDOW : i]]
        centre = median(before)
        spread = median(abs(v - centre) for v in before)
        step, value = loss[i]
        if value > 1.5 * centre and value > centre + SPIKE_FACTOR * spread and value - centre > 0.05:
            of = members(step) if members else Members([], [], "")
            named = f": {of.words}" if members else ""
            found.append(
                Finding(
                    "spike",
                    step,
                    f"update {step} had a loss of {value:.3f} after {centre:.3f}{named}",
                    of.blocks[:64],
                    of.row_ids[:64],
                    of.replay,
                )
            )
            if len(found) == most:
                break
    return found


def _overfitting(loss: Curve, val_loss: Curve) -> list[Finding]:
    """Validation above its lowest by two percent at the last two evaluations, while the training loss kept falling."""
    if len(val_loss) < 4:
        return []
    best_step, best = min(val_loss, key=lambda x: (x[1], x[0]))
    last = val_loss[-2:]
    if any(v <= 1.02 * best or s <= best_step for s, v in last):
        return []
    around = [v for s, v in loss if best_step - 5 <= s <= best_step + 5]
    end = [v for _, v in loss[-10:]]
    if around and end and mean(end) < mean(around):
        return [
            Finding(
                "overfitting",
                last[-1][0],
                f"the validation loss was lowest at update {best_step} ({best:.4f}) and is {last[-1][1]:.4f} now, while the training loss fell on: fewer epochs, more data or more dropout",
            )
        ]
    return []

"""What looks wrong in the curves of a training, in words. Pure functions over (step, value) lists.

Nothing here decides what is trained or whether a blocking check passes, so it is no part of the code version:
what it writes, diagnosis.json, is volatile.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from sft_pipeline.stages.stage import Check, table
from sft_pipeline.training.progress import Curve

SPIKE_WINDOW = 20
SPIKE_FACTOR = 8.0
TOO_FAST = 0.01


@dataclass(frozen=True)
class CurveFinding:
    """`kind` is one of not_decreasing, near_zero_too_fast, diverging, spike, overfitting, not_finite."""

    kind: str
    step: int
    words: str
    blocks: list[int] = field(default_factory=list)
    row_ids: list[str] = field(default_factory=list)
    replay: str = ""


@dataclass(frozen=True)
class UpdateRows:
    """What an update is made of, and the command that shows it row by row."""

    blocks: list[int]
    row_ids: list[str]
    replay: str

    @property
    def words(self) -> str:
        def first(values: Sequence[object], most: int = 4) -> str:
            more = f" and {len(values) - most} more" if len(values) > most else ""
            return ", ".join(map(str, values[:most])) + more

        return f"blocks {first(self.blocks)}, rows {first(self.row_ids)}. Look at it with `{self.replay}`"


def diagnose(
    loss: Curve, val_loss: Curve, rows_of: Callable[[int], UpdateRows] | None = None
) -> list[CurveFinding]:
    """Everything that looks wrong; empty when nothing does.

    Args:
        rows_of: Of the update that made a step, to name what caused a spike.
    """
    return [*_slope(loss), *_too_fast(loss), *_spikes(loss, rows_of), *_overfitting(loss, val_loss)]


def diagnosis_check(findings: list[CurveFinding]) -> Check:
    """The check that does not block: the first finding, with all of them as a table."""
    if not findings:
        return Check("diagnosis", True, "Nothing looks wrong in the curves.")
    rows = [{"kind": f.kind, "update": f.step, "what": f.words, "replay": f.replay} for f in findings]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return Check("diagnosis", False, findings[0].words + more, {"findings": table(rows)})


def _slope(loss: Curve) -> list[CurveFinding]:
    """Compares the first and the last tenth (three updates at least); the level must fall by two percent."""
    if len(loss) < 10:
        return []
    n = max(3, len(loss) // 10)
    first, last = mean(v for _, v in loss[:n]), mean(v for _, v in loss[-n:])
    step = loss[-1][0]
    if last > 1.2 * first:
        words = (
            f"the loss rose from {first:.3f} to {last:.3f}: the learning rate is too high, "
            "or the labels are wrong. Try a third of the learning rate"
        )
        return [CurveFinding("diverging", step, words)]
    if last > 0.98 * first and first > 0.05:
        words = (
            f"the loss stayed at {last:.3f} (it began at {first:.3f}): the learning rate is too low, "
            "nothing is trained, or there is nothing to learn in the labels"
        )
        return [CurveFinding("not_decreasing", step, words)]
    return []


def _too_fast(loss: Curve) -> list[CurveFinding]:
    if len(loss) < 20 or loss[0][1] < 0.1:
        return []
    for step, value in loss[: len(loss) // 5]:
        if value < TOO_FAST:
            words = (
                f"the loss was {value:.4f} after {step} updates: the answers may stand in the prompts, "
                "or rows repeat. Look at them with `sft inspect`"
            )
            return [CurveFinding("near_zero_too_fast", step, words)]
    return []


def _spikes(loss: Curve, rows_of: Callable[[int], UpdateRows] | None, most: int = 5) -> list[CurveFinding]:
    """An update whose loss is eight median deviations, and half, above the median of those before it."""
    found = []
    for i in range(SPIKE_WINDOW, len(loss)):
        before = [v for _, v in loss[i - SPIKE_WINDOW : i]]
        centre = median(before)
        spread = median(abs(v - centre) for v in before)
        step, value = loss[i]
        if value > 1.5 * centre and value > centre + SPIKE_FACTOR * spread and value - centre > 0.05:
            rows = rows_of(step) if rows_of else UpdateRows([], [], "")
            named = f": {rows.words}" if rows_of else ""
            words = f"update {step} had a loss of {value:.3f} after {centre:.3f}{named}"
            found.append(CurveFinding("spike", step, words, rows.blocks[:64], rows.row_ids[:64], rows.replay))
            if len(found) == most:
                break
    return found


def _overfitting(loss: Curve, val_loss: Curve) -> list[CurveFinding]:
    """The last two validation losses are 2 % above the lowest, while the training loss kept falling."""
    if len(val_loss) < 4:
        return []
    best_step, best = min(val_loss, key=lambda x: (x[1], x[0]))
    last = val_loss[-2:]
    if any(v <= 1.02 * best or s <= best_step for s, v in last):
        return []
    around = [v for s, v in loss if best_step - 5 <= s <= best_step + 5]
    end = [v for _, v in loss[-10:]]
    if not around or not end or mean(end) >= mean(around):
        return []
    words = (
        f"the validation loss was lowest at update {best_step} ({best:.4f}) and is {last[-1][1]:.4f} now, "
        "while the training loss fell on: fewer epochs, more data or more dropout"
    )
    return [CurveFinding("overfitting", last[-1][0], words)]

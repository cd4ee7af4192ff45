"""What people look at: the planned learning rate, the curves of the trials, and what the training will take.

It decides nothing. Plots, and forecast.json, are volatile files of the artifact.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, pstdev
from typing import TYPE_CHECKING

from sft_pipeline.plots.training import plot_curve, plot_loss
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.stage import Build, Evidence, markdown, number, plot
from sft_pipeline.store.files import write_json
from sft_pipeline.training.memory import memory_slack_mb, peak_memory_mb
from sft_pipeline.training.schedule import Schedule, curve
from sft_pipeline.training.shards import Plan

if TYPE_CHECKING:
    from sft_pipeline.stages.sanity_check.protocol import OverfitResult, ShortRun, WorstMicrobatch

# What a short run cannot show: a busier machine or a hotter device later, buffers that grow. A share of the
# whole.
TIME_UNSEEN, MEMORY_UNSEEN = 0.1, 0.05
MOMENTS_BYTES = 8  # two of AdamW's in fp32, for each trained parameter


def planned_updates(b: Build, config: SanityCheckConfig) -> int:
    """Updates that the training will make."""
    planned = len(Plan(b.inputs["packed_shards"].file("plan.parquet")))
    return min(planned, config.training.max_steps or planned)


def plot_learning_rate(b: Build, config: SanityCheckConfig) -> dict[str, Evidence]:
    """The rate of every update that the training will make, before it makes the first."""
    total = planned_updates(b, config)
    schedule = Schedule.of(config.training, config.model)
    title = f"Learning rate schedule: {schedule.kind}, {total:,} updates"
    plot_curve(b.out / "plots" / "learning_rate.png", list(enumerate(curve(total, schedule), 1)), title, "")
    return {"learning_rate_curve": plot("plots/learning_rate.png")}


def plot_overfit(b: Build, result: "OverfitResult") -> dict[str, Evidence]:
    """The loss of the overfitting trial."""
    losses, title = list(enumerate(result.losses)), f"Overfitting {result.rows} rows"
    plot_curve(b.out / "plots" / "overfit.png", losses, title, "nats per supervised token")
    return {"overfit_curve": plot("plots/overfit.png")}


def plot_short_run(b: Build, run: "ShortRun") -> dict[str, Evidence]:
    """The losses of the short run."""
    path = b.out / "plots" / "short_run.png"
    plot_loss(path, run.loss, run.val_loss, "Short run: loss per supervised token")
    return {"short_run_curve": plot("plots/short_run.png")}


@dataclass(frozen=True)
class Forecast:
    """Of the whole training, in one process.

    Attributes:
        error: One standard deviation of the updates' own spread, and a tenth for what a short run does not
            show.
        memory_mb: The peak.
    """

    updates: int
    seconds: float
    error: float
    memory_mb: float
    memory_error_mb: float

    def __str__(self) -> str:
        return (
            f"{self.updates:,} updates in about {_clock(self.seconds)} (give or take {_clock(self.error)}) "
            "in one process, evaluations and checkpoints not counted; "
            f"{self.memory_mb:,.0f} MB (give or take {self.memory_error_mb:,.0f})"
        )


def forecast(
    seconds: Sequence[float], updates: int, worst: "WorstMicrobatch", trained_parameters: int
) -> Forecast | None:
    """Time from the short run, memory from the fullest micro-batch.

    Args:
        seconds: Of the short run's updates, of which the first, which warms things up, does not count.
        updates: Of the whole training.

    Returns:
        None where the short run made no update.
    """
    seconds = seconds[1:] or seconds
    if not seconds:
        return None
    spread = pstdev(seconds) if len(seconds) > 1 else seconds[0]
    total = mean(seconds) * updates
    # The sum's own noise, that of the mean it is scaled from, and the unseen.
    error = spread * math.sqrt(updates) + updates * spread / math.sqrt(len(seconds)) + TIME_UNSEEN * total
    memory = max(worst.memory_mb + trained_parameters * MOMENTS_BYTES / 2**20, peak_memory_mb())
    return Forecast(updates, total, error, memory, MEMORY_UNSEEN * memory + memory_slack_mb())


def write_forecast(
    b: Build,
    config: SanityCheckConfig,
    seconds: Sequence[float],
    worst: "WorstMicrobatch",
    trained_parameters: int,
) -> dict[str, Evidence]:
    """Writes forecast.json, and logs what it says."""
    expected = forecast(seconds, planned_updates(b, config), worst, trained_parameters)
    if expected is None:
        return {}
    b.report.log(f"forecast: {expected}")
    write_json(b.out / "forecast.json", {**asdict(expected), "worst_micro_batch": asdict(worst)})
    return {
        "forecast": markdown(str(expected)),
        "forecast_seconds": number(round(expected.seconds, 1)),
        "memory_mb": number(round(expected.memory_mb, 1)),
    }


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

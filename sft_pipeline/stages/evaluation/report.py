"""What people look at: log lines, the base-vs-tuned table, a few samples, plots. It decides nothing."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

from sft_pipeline.plots.evaluation import plot_checkpoints, plot_comparison
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.compare import ConfidenceInterval, PairedComparison
from sft_pipeline.stages.evaluation.judge import SAMPLE_COLUMNS, Judgement
from sft_pipeline.stages.evaluation.select import Selection
from sft_pipeline.stages.stage import Evidence, markdown, number, plot, table, text

SAMPLES, SAMPLE_CHARACTERS = 6, 300
SAMPLED_ROWS = 4096  # the first of the test split, which samples are taken from


def checkpoint_judged(reporter: Reporter, step: int, judgement: Judgement) -> None:
    """Logs a checkpoint's scores on the validation split, and sends them to the trackers."""
    values = judgement.measures()
    reporter.metrics({f"validation/{k}": v for k, v in values.items() if not math.isnan(v)}, step=step)
    cut = f", {judgement.unfinished} replies cut" if judgement.unfinished else ""
    reporter.log(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()) + cut)


def evidence(
    out: Path, comparisons: Sequence[PairedComparison], selection: Selection, reporter: Reporter
) -> dict[str, Evidence]:
    """Tables, numbers and plots of the finished evaluation; its samples and test scores go to the trackers.

    Args:
        out: The artifact's folder, with samples.parquet; plots are written to `plots/` in it.
    """
    values: dict[str, float] = {}
    for c in comparisons:
        values[f"test/base_{c.name}"] = c.base.value
        values[f"test/tuned_{c.name}"] = c.tuned.value
        values[f"test/difference_{c.name}"] = c.difference.value
    reporter.metrics({k: v for k, v in values.items() if not math.isnan(v)}, step=selection.step)
    samples = some_samples(out / "samples.parquet", selection.step)
    if samples:
        reporter.samples(samples, step=selection.step)
    plot_checkpoints(out / "plots" / "checkpoints.png", selection)
    found = {
        "scores_over_steps": plot("plots/checkpoints.png"),
        "base_vs_tuned": markdown(comparison_markdown(comparisons)),
        "checkpoints": table(selection.to_json()),
        "choice": text(selection.why),
        "samples": table(samples),
    }
    measured = [c for c in comparisons if not math.isnan(c.tuned.value)]
    if measured:
        plot_comparison(out / "plots" / "base_vs_tuned.png", measured)
        found["base_vs_tuned_plot"] = plot("plots/base_vs_tuned.png")
    for c in measured:
        found[f"tuned_{c.name}"] = number(c.tuned.value)
        found[f"base_{c.name}"] = number(c.base.value)
    return found


def comparison_markdown(comparisons: Sequence[PairedComparison]) -> str:
    """The base-vs-tuned table."""
    lines = [
        "| measure | base | tuned | difference | better / worse / equal | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in comparisons:
        name = f"{c.name} (lower is better)" if c.lower_is_better else c.name
        p = "–" if math.isnan(c.p_value) else "< 0.001" if c.p_value < 0.001 else f"{c.p_value:.3f}"
        lines.append(
            f"| {name} | {_with_interval(c.base)} | {_with_interval(c.tuned)} "
            f"| {_with_interval(c.difference, '+')} | {c.wins} / {c.losses} / {c.ties} | {p} |"
        )
    if comparisons:
        c = comparisons[0]
        lines += [
            "",
            f"{c.rows} test rows in {c.groups} groups; 95 % intervals by a bootstrap over groups; "
            "p by the exact sign test over rows.",
        ]
    return "\n".join(lines)


def _with_interval(i: ConfidenceInterval, sign: str = "") -> str:
    return "–" if math.isnan(i.value) else f"{i.value:{sign}.3f} ({i.low:{sign}.3f} to {i.high:{sign}.3f})"


def some_samples(path: Path, step: int) -> list[dict[str, Any]]:
    """A few test rows with the replies of the tuned model and the base, up to half of them wrong, in their
    order.

    Args:
        path: samples.parquet.
        step: Of the chosen checkpoint.
    """
    # From the file: the judge holds no more than a few thousand replies at a time.
    samples = ds.dataset(path)
    test = ds.field("side") == "test"
    rows = samples.head(SAMPLED_ROWS, filter=test & (ds.field("step") == step)).to_pylist()
    graders = [name for name in samples.schema.names if name not in SAMPLE_COLUMNS]
    wrong = [i for i, row in enumerate(rows) if any(row[g] < 1 for g in graders)]
    right = sorted(set(range(len(rows))) - set(wrong))
    taken = wrong[: max(SAMPLES // 2, SAMPLES - len(right))] + right
    rows = [rows[i] for i in sorted(taken[:SAMPLES])]
    if not rows:
        return []
    of_base = samples.to_table(
        ["row_id", "reply"],
        filter=test & ds.field("step").is_null() & ds.field("row_id").isin([r["row_id"] for r in rows]),
    )
    base = {r["row_id"]: r["reply"] for r in of_base.to_pylist()}
    return [
        {
            "row_id": row["row_id"],
            **{name: _clipped(row[name]) for name in ("prompt", "reply", "expected")},
            "finished": row["finished"],
            **{name: row[name] for name in graders},
            "base_reply": _clipped(base.get(row["row_id"], "")),
        }
        for row in rows
    ]


def _clipped(reply: str) -> str:
    half = SAMPLE_CHARACTERS // 2
    return reply if len(reply) <= SAMPLE_CHARACTERS else f"{reply[:half]} … {reply[-half:]}"

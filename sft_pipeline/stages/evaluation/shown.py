"""What people look at: the base-vs-tuned table, scores over the checkpoints, samples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_pipeline.plots.canvas import blank, save
from sft_pipeline.stages.evaluation.compare import Comparison, Interval
from sft_pipeline.stages.evaluation.select import Selection

SHOWN_CHARACTERS = 300


def comparison_markdown(comparisons: Sequence[Comparison]) -> str:
    """The base-vs-tuned table."""
    lines = [
        "| measure | base | tuned | difference | better / worse / equal | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in comparisons:
        name = f"{c.name} (lower is better)" if c.lower_is_better else c.name
        lines.append(
            f"| {name} | {_with_interval(c.base)} | {_with_interval(c.tuned)} | {_with_interval(c.difference, '+')} | {c.wins} / {c.losses} / {c.ties} | {_p(c.p_value)} |"
        )
    if comparisons:
        c = comparisons[0]
        lines += [
            "",
            f"{c.rows} test rows in {c.groups} groups; 95 % intervals by a bootstrap over groups; p by the exact sign test over rows.",
        ]
    return "\n".join(lines)


def _with_interval(i: Interval, sign: str = "") -> str:
    return "–" if math.isnan(i.value) else f"{i.value:{sign}.3f} ({i.low:{sign}.3f} to {i.high:{sign}.3f})"


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def checkpoint_rows(selection: Selection) -> list[dict[str, Any]]:
    """The checkpoint table, the chosen one marked, NaN as null."""
    return [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        | {"chosen": row["step"] == selection.step}
        for row in selection.table
    ]


def some_samples(rows: Sequence[Mapping[str, Any]], count: int = 6) -> list[dict[str, Any]]:
    """A few samples, up to half of them wrong, in the order they came."""
    wrong = [i for i, r in enumerate(rows) if any(s < 1 for s in r["scores"].values())]
    right = [i for i in range(len(rows)) if i not in set(wrong)]
    taken = wrong[: max(count // 2, count - len(right))] + right[:count]
    return [
        {
            "row_id": r["row_id"],
            "prompt": clip(r["prompt"]),
            "reply": clip(r["reply"]),
            "expected": clip(r["expected"]),
            "finished": r["finished"],
            **r["scores"],
        }
        for r in (rows[i] for i in sorted(taken[:count]))
    ]


def clip(text: str) -> str:
    """The text, its middle left out where it is long."""
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"


def plot_comparison(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Bars of base and tuned with their intervals, the losses in a panel of their own."""
    panels = [
        p
        for p in (
            [c for c in comparisons if not c.lower_is_better],
            [c for c in comparisons if c.lower_is_better],
        )
        if p
    ]
    figure = blank(1.5 + 1.7 * max(len(comparisons), 2), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[len(p) for p in panels])[0]
    for axis, panel in zip(axes, panels):
        for offset, which, colour in ((-0.2, "base", "#9aa5b1"), (0.2, "tuned", "#2f6fb3")):
            intervals: list[Interval] = [getattr(c, which) for c in panel]
            low = [max(0.0, i.value - i.low) for i in intervals]
            high = [max(0.0, i.high - i.value) for i in intervals]
            axis.bar(
                [x + offset for x in range(len(panel))],
                [i.value for i in intervals],
                0.4,
                yerr=[low, high],
                capsize=3,
                color=colour,
                label=which,
            )
        axis.set_xticks(range(len(panel)), [c.name for c in panel], rotation=15, ha="right", fontsize=8)
        if panel[0].lower_is_better:
            axis.set_title("nats per token, lower is better", fontsize=8)
        else:
            axis.set_title("higher is better", fontsize=8)
            axis.set_ylim(0, max(1.05, *(1.1 * c.tuned.high for c in panel)))
    axes[0].legend(fontsize=8)
    save(figure, path)


def plot_checkpoints(path: Path, selection: Selection) -> None:
    """Validation scores (left axis) and loss (right axis) over the steps; the chosen step is marked."""
    figure = blank(6, 3.6)
    axis = figure.subplots()
    steps = [r["step"] for r in selection.table]
    names = [n for n in selection.table[0] if n not in ("step", "gates", "rank", "val_loss")]
    for name in names:
        axis.plot(steps, [r[name] for r in selection.table], marker="o", markersize=3, label=name)
    right = axis.twinx()
    right.plot(
        steps,
        [r["val_loss"] for r in selection.table],
        color="#888888",
        linestyle="--",
        marker=".",
        label="val_loss",
    )
    axis.axvline(selection.step, color="#2f6fb3", alpha=0.3, linewidth=6)
    axis.set_xlabel("step (the chosen one is shaded)")
    axis.set_ylabel("score")
    right.set_ylabel("val_loss, nats per token")
    handles, labels = axis.get_legend_handles_labels()
    more, also = right.get_legend_handles_labels()
    figure.legend(handles + more, labels + also, fontsize=8, loc="outside lower center", ncols=3)
    save(figure, path)

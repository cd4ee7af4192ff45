"""What people look at in grouped_split: tables and plots."""

from pathlib import Path

from sft_pipeline.plots.data import plot_bars, plot_histogram
from sft_pipeline.stages.grouped_split.checks import SplitOutcome
from sft_pipeline.stages.stage import Evidence, number, plot, table
from sft_pipeline.tables.schemas import ROWS, SPLITS


def evidence(out: Path, outcome: SplitOutcome) -> dict[str, Evidence]:
    """Tables and plots; the plots are written under out/plots/."""
    counts = outcome.counts
    plot_bars(
        out / "plots" / "splits.png",
        SPLITS,
        {"rows": [counts[name] for name in SPLITS], "groups": [counts[f"{name}_groups"] for name in SPLITS]},
        title="Rows and groups per split",
        y="number",
    )
    plot_histogram(
        out / "plots" / "lengths.png",
        {name: s.lengths for name, s in outcome.written.items() if s.rows},
        title="Characters per row",
        x="characters",
    )
    splits = []
    for name, summary in outcome.written.items():
        data = summary.to_json(counts[f"{name}_groups"])
        characters = data["characters"] or {"mean": 0, "median": 0, "p95": 0, "max": 0}
        splits.append(
            {
                "split": name,
                "rows": data["rows"],
                "groups": data["groups"],
                "replies": data["turns"],
                **{f"characters {k}": v for k, v in characters.items()},
            }
        )
    return {
        "row_count": number(sum(counts[name] for name in SPLITS)),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
        "splits": table(splits),
        **{f"{name}_rows": number(counts[name]) for name in SPLITS},
        "near_duplicates_dropped": number(outcome.rejects),
        "near_duplicates": table(outcome.worst_pairs),
        "rows_and_groups": plot("plots/splits.png"),
        "lengths": plot("plots/lengths.png"),
    }

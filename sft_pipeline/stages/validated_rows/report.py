"""What people look at in validated_rows: quarantine.md, tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.plots.data import plot_histogram
from sft_pipeline.stages.stage import Evidence, markdown, number, plot, table
from sft_pipeline.stages.validated_rows.config import SourceShape
from sft_pipeline.stages.validated_rows.statistics import RowStatistics
from sft_pipeline.tables import parquet
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import ROWS

EXAMPLES = 3


def reason_table(path: Path) -> list[dict[str, str | int]]:
    """Rows per reason, most frequent first, with explanations. A row with two reasons counts twice.

    `most_often`: what of the rows it is about, the most frequent first.
    """
    meaning = {str(reason): reason.explanation for reason in RejectReason}
    details = parquet.count_details([path])
    return [
        {
            "reason": name,
            "rows": count,
            "most_often": ", ".join(text for text, _ in details[name].most_common(3)),
            "meaning": meaning[name.partition(":")[0]],
        }
        for name, count in parquet.count_reasons([path]).items()
    ]


def write_report(path: Path, quarantine: Path, read: int, warnings: dict[str, int]) -> None:
    """Writes quarantine.md: counts per reason, and up to three examples of each.

    Args:
        read: Rows of the snapshot.
        warnings: Rows per warning; these rows were accepted.
    """
    rows = parquet.count_rows([quarantine])
    found = reason_table(quarantine)
    examples: dict[str, list[str]] = {str(entry["reason"]): [] for entry in found}
    for row in parquet.read_rows([quarantine]):
        for reason in row["reasons"]:
            if len(examples[reason]) < EXAMPLES:
                examples[reason].append(f"- `{row['file']}:{row['line']}` {_code(row['raw'])}")
        if all(len(e) >= min(EXAMPLES, int(entry["rows"])) for entry, e in zip(found, examples.values())):
            break
    lines = [
        "# Quarantine",
        "",
        f"{rows:,} of {read:,} rows ({rows / max(1, read):.2%}) were rejected. A row may have several "
        "reasons.",
        "",
    ]
    if found:
        lines += ["| reason | rows | meaning |", "| --- | ---: | --- |"]
        lines += [f"| {e['reason']} | {e['rows']:,} | {e['meaning']} |" for e in found]
        for entry in found:
            lines += ["", f"## {entry['reason']}", "", *examples[str(entry["reason"])]]
    if warnings:
        lines += ["", "## Warnings on accepted rows", "", "| warning | rows |", "| --- | ---: |"]
        lines += [f"| {_code(name)} | {count:,} |" for name, count in _most_frequent(warnings)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _code(raw: str, limit: int = 240) -> str:
    """Text as Markdown code on one line, shortened."""
    text = " ".join(raw[: limit + 1].split()).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    more = f" … ({len(raw):,} characters)" if len(raw) > limit else ""
    return f"{fence} {text} {fence}{more}" if "`" in text else f"{fence}{text}{fence}{more}"


def evidence(
    out: Path, counts: Mapping[str, int], statistics: RowStatistics, shapes: Sequence[SourceShape]
) -> dict[str, Evidence]:
    """Numbers, tables and plots; the plot is written under out/plots/.

    Args:
        out: The artifact, with quarantine.parquet and quarantine.md.
        shapes: Of the sources, with the formats that were found.
    """
    characters = {"prompt": statistics.prompt_characters, "completion": statistics.completion_characters}
    plot_histogram(out / "plots" / "characters.png", characters, title="Characters per row", x="characters")
    lengths = [
        {
            "part": name,
            "mean": round(float(found.mean()), 1),
            "median": int(np.median(found)),
            "longest": int(found.max()),
        }
        for name, found in characters.items()
        if len(found)
    ]
    return {
        "row_count": number(counts["accepted"]),
        "quarantined": number(counts["quarantined"]),
        "groups": number(counts["groups"]),
        "column_schema": Evidence("schema", {f.name: str(f.type) for f in ROWS}),
        "reasons": table(list(reason_table(out / "quarantine.parquet"))),
        "warnings": table([{"warning": w, "rows": n} for w, n in _most_frequent(statistics.warnings)]),
        "unused_fields": table([{"field": f, "rows": n} for f, n in _most_frequent(statistics.unused)]),
        "formats": table([{"source": i, "format": s.format} for i, s in enumerate(shapes)]),
        "turns_arranged": table([{"by": k, "turns": n} for k, n in _most_frequent(statistics.arranged)]),
        "roles": table([{"role": r, "messages": n} for r, n in _most_frequent(statistics.roles)]),
        "turns": table([{"replies per row": t, "rows": n} for t, n in sorted(statistics.turns.items())[:20]]),
        "lengths": table(lengths),
        "characters": plot("plots/characters.png"),
        "report": markdown((out / "quarantine.md").read_text(encoding="utf-8")[:20_000]),
    }


def _most_frequent(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))

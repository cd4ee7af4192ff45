"""`sft preview`: the first rows of a dataset as messages, and those that would be rejected."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_pipeline.cli.console import printable
from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.load import find_dataset, load_catalog
from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.locate import snapshots

ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}
LONGEST = 600  # characters of a message that are shown


def preview_dataset(name_or_path: str, *, snapshot: str | None, number: int) -> dict[str, Any]:
    """The JSON of the command; nothing is built.

    Raises:
        InputError: There is no such dataset or snapshot, or its files cannot be read.
    """
    dataset = find_dataset(load_catalog(), name_or_path)
    return preview(dataset, snapshot, number)


def preview(dataset: DatasetConfig, snapshot: str | None, number: int) -> dict[str, Any]:
    """As `preview_dataset`, of a dataset that is at hand."""
    from sft_pipeline.preview.sample import sample_dataset

    known = snapshots(dataset.sources)
    if not known or (snapshot is not None and snapshot not in known):
        named = f"no snapshot {snapshot}; it has {', '.join(known[-5:])}" if known else "no snapshot"
        raise InputError(f"dataset {dataset.name} has {named}")
    snapshot = snapshot or known[-1]
    found = sample_dataset(dataset, snapshot)
    reasons = Counter(reason for row in found.rejected for reason in row["reasons"])
    return {
        "dataset": dataset.name,
        "snapshot": snapshot,
        "formats": found.formats,
        "groups": found.groups,
        "read": found.read,
        "whole": found.whole,
        "accepted": len(found.rows),
        "reject_rate": found.reject_rate,
        "max_reject_rate": dataset.contract.max_reject_rate,
        "reasons": dict(reasons.most_common()),
        "unused": dict(found.unused.most_common()),
        "arranged": dict(found.arranged),
        "absent": found.absent,
        "rows": found.rows[:number],
        "rejected": found.rejected[: max(number, 10)],
    }


def show_preview(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    part = "all" if result["whole"] else "the first"
    formats = ", ".join(result["formats"])
    groups = ", ".join("each row its own group" if g is None else f"grouped by {g}" for g in result["groups"])
    console.print(
        f"{result['dataset']} {result['snapshot']}: {result['accepted']:,} rows accepted of {part} "
        f"{result['read']:,} (format {formats}; {groups})",
        style="bold",
        soft_wrap=True,
    )
    for row in result["rows"]:
        console.print(f"{row['file']}:{row['line']}  group {row['group']}", style="dim", soft_wrap=True)
        for message in row["messages"]:
            console.print(_shown(message), soft_wrap=True)
    if result["unused"]:
        names = ", ".join(f"{name} ({count:,})" for name, count in list(result["unused"].items())[:12])
        console.print(f"columns that nothing reads: {names}", style="dim", soft_wrap=True)
    for name in result["absent"]:
        console.print(f"no such column in these rows: {name}", style="yellow", soft_wrap=True)
    for rule, count in result["arranged"].items():
        console.print(f"{count:,} turns by contract.{rule}", style="dim")
    if result["rejected"]:
        _show_rejected(result, console)


def _shown(message: dict[str, Any]) -> Text:
    content = message["content"] or ""
    more = f" … ({len(content):,} characters)" if len(content) > LONGEST else ""
    said = content[:LONGEST] + more
    for name in ("reasoning_content", "tool_calls", "name", "tool_call_id", "weight"):
        if message[name] is not None:
            said += f"\n    {name}: {str(message[name])[:LONGEST]}"
    role = message["role"]
    return Text.assemble((f"  {role:<10}", ROLE_STYLES.get(role, "")), printable(said))


def _show_rejected(result: dict[str, Any], console: Console) -> None:
    named = ", ".join(f"{reason} {count:,}" for reason, count in result["reasons"].items())
    over = result["reject_rate"] > result["max_reject_rate"]
    console.print(
        f"rejected: {named} ({result['reject_rate']:.1%}; contract.max_reject_rate is "
        f"{result['max_reject_rate']:.0%})",
        style="red" if over else "yellow",
        soft_wrap=True,
    )
    table = Table("where", "why", "row")
    for row in result["rejected"]:
        why = "; ".join(f"{r} ({d})" if d else r for r, d in zip(row["reasons"], row["details"]))
        table.add_row(f"{row['file']}:{row['line']}", why, row["raw"][:120])
    console.print(table)

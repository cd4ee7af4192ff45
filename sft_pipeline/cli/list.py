"""`sft list`: what there is."""

from typing import Any

from rich.console import Console

from sft_pipeline.cli.sizes import duration_text, plural, size_text, table_of
from sft_pipeline.errors import InputError
from sft_pipeline.inventory.listing import MOST_RUNS, list_artifacts, list_models, list_runs
from sft_pipeline.store import Store

KINDS = ("models", "runs", "artifacts")
SHORT = 12  # digits of a fingerprint
RUN_SHORT = 8
CURRENT = "*"
LEGEND = f"{CURRENT} current: the last that was made without overrides"


def list_items(what: str, *, console: Console, out: Console | None) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`.

    Raises:
        InputError: There is no such kind of things.
    """
    if what not in KINDS:
        raise InputError(f"sft list {what}: what there is to list are {', '.join(KINDS)}")

    def unreadable(error: InputError) -> None:
        console.print(f"left out: {error}", style="yellow", soft_wrap=True)

    if what == "runs":
        items = list_runs()
        if out is not None:
            show_runs(items, out)
        return {"items": items}
    store = Store()
    if what == "artifacts":
        items = list_artifacts(store, unreadable)
        if out is not None:
            show_artifacts(items, out)
        return {"items": items}
    items, problem = list_models(store, unreadable)
    if problem:
        console.print(f"aliases are unknown: {problem}", style="yellow", soft_wrap=True)
    if out is not None:
        show_models(items, out)
    return {"items": items, "aliases_unknown": problem}


def show_models(items: list[dict[str, Any]], console: Console) -> None:
    """One line for each model: what it is, what it scores, how it stands."""
    if not items:
        console.print("there is no exported model yet: `sft run RECIPE` makes one")
        return
    table = table_of(
        ("!", "recipe", "snapshot!", "model!", "test score", "base>", "tuned>", "size>", "age>", "")
    )
    for item in items:
        table.add_row(
            CURRENT if item["current"] else "",
            item["recipe"],
            item["snapshot"],
            item["fingerprint"][:SHORT],
            item["rank_by"] or "–",
            _number(item["base"]),
            _number(item["tuned"]),
            size_text(item["bytes"]),
            duration_text(item["age_seconds"]),
            _state(item),
        )
    console.print(table)
    console.print(LEGEND, style="dim")


def show_artifacts(items: list[dict[str, Any]], console: Console) -> None:
    """One line for each artifact, and their total size."""
    if not items:
        console.print("the store is empty")
        return
    table = table_of(("!", "asset", "snapshot!", "artifact!", "size>", "age>", ""))
    for item in items:
        table.add_row(
            CURRENT if item["current"] else "",
            item["asset"],
            item["snapshot"],
            item["fingerprint"][:SHORT],
            size_text(item["bytes"]),
            duration_text(item["age_seconds"]),
            _state(item),
        )
    console.print(table)
    console.print(LEGEND, style="dim")
    console.print(
        f"{plural(len(items), 'artifact')}, {size_text(sum(item['bytes'] for item in items))}; `sft gc "
        "--dry-run` says what nothing needs any more"
    )


def show_runs(items: list[dict[str, Any]], console: Console) -> None:
    """One line for each run."""
    if not items:
        console.print("there was no run yet")
        return
    table = table_of(("run!", "recipe", "snapshot!", "status!", "started (UTC)!", "took>", ""))
    for item in items:
        table.add_row(
            item["id"][:RUN_SHORT],
            item["recipe"] or item["job"],
            item["snapshot"] or "–",
            item["status"],
            item["started_at"][:16].replace("T", " "),
            duration_text(item["seconds"]),
            "experiment" if item["experiment"] else "",
        )
    console.print(table)
    if len(items) == MOST_RUNS:
        console.print(f"the newest {MOST_RUNS}; `sft ui` shows all")


def _state(item: dict[str, Any]) -> str:
    words = [] if item["accepted"] else ["not accepted"]
    words += item.get("aliases") or []
    words += ["pinned"] if item["pinned"] else []
    if "aliases" in item and item["aliases"] is None:
        words.append("alias unknown")
    return ", ".join(words)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"

"""`sft gc`: removes what nothing needs any more, and says first what and how much."""

import re
from typing import Any

from rich.console import Console
from rich.table import Table

from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.cli.model import find_model
from sft_pipeline.cli.sizes import plural, size_text, table_of
from sft_pipeline.errors import InputError
from sft_pipeline.inventory.collect import Collection, collect, find_artifact
from sft_pipeline.inventory.needed import KeepRule
from sft_pipeline.inventory.pins import about, pin, unpin
from sft_pipeline.store import Store

_HEXADECIMAL = re.compile("[0-9a-f]{6,64}")


def collect_garbage(
    *, dry_run: bool, older_than: float, keep_last: int, console: Console, out: Console | None
) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`, before anything is removed.

    Raises:
        SftError: Something needed cannot be read, so that nothing was removed.
    """

    def planned(collection: Collection) -> None:
        if out is not None:
            show_plan(collection, out, dry_run=dry_run)

    with ConsoleReporter(console) as reporter:
        found = collect(
            Store(), KeepRule(older_than, keep_last), dry_run=dry_run, report=reporter, planned=planned
        )
    if out is not None:
        if dry_run:
            out.print("nothing was removed: this is a dry run")
        else:
            out.print(f"removed {plural(len(found.removed), 'folder')}, {size_text(found.bytes)} freed")
    return {**found.to_json(), "dry_run": dry_run}


def change_pins(pins: list[str], unpins: list[str], *, dry_run: bool, out: Console | None) -> dict[str, Any]:
    """Pins and unpins; nothing is collected. The JSON of the command.

    Args:
        pins: Models, or beginnings of the fingerprints of any artifacts.
        unpins: Beginnings of fingerprints.

    Raises:
        InputError: One of them names nothing, or the command was to do something else too.
    """
    if dry_run:
        raise InputError("--pin and --unpin collect nothing: leave --dry-run out")
    store = Store()
    done: dict[str, list[str]] = {"pinned": [], "unpinned": []}
    for text in pins:
        artifact = find_artifact(text, store) if _HEXADECIMAL.fullmatch(text) else find_model(text, store)
        pin(artifact, store)
        fingerprint = artifact.manifest.fingerprint
        done["pinned"].append(fingerprint)
        if out is not None:
            out.print(f"pinned {fingerprint[:12]} ({about(fingerprint, store)}), with all it was made from")
    for text in unpins:
        done["unpinned"].append(unpin(text, store))
        if out is not None:
            out.print(f"unpinned {done['unpinned'][-1][:12]}")
    return {"removed": [], "bytes": 0, **done}


def show_plan(collection: Collection, console: Console, *, dry_run: bool) -> None:
    """What goes, by asset; models one by one; what stays, and why."""
    would = "would be removed" if dry_run else "is removed"
    groups: dict[str, list[int]] = {}
    for folder in collection.removed:
        name = folder.asset or "unknown"
        if folder.kind == "work":
            name = "work folders of finished builds" if folder.asset else "work folders with no checkpoint"
        elif name.endswith("/exported_model"):
            name = f"{name} {folder.partition} ({folder.fingerprint[:12]})"
        groups.setdefault(name, []).append(folder.bytes)
    if groups:
        table = table_of(("", "folders>", "size>"), title=f"what {would}")
        for name, sizes in groups.items():
            table.add_row(name, f"{len(sizes):,}", size_text(sum(sizes)))
        table.add_section()
        table.add_row("total", f"{len(collection.removed):,}", size_text(collection.bytes))
        console.print(table)
    else:
        console.print("there is nothing to remove")
    if collection.swept:
        console.print(f"swept {plural(len(collection.swept), 'abandoned staging folder')}")
    _show_kept(collection, console)


def _show_kept(collection: Collection, console: Console) -> None:
    if collection.kept:
        total = sum(collection.kept.values())
        reasons: Table = table_of(("why", "artifacts>"), title=f"kept: {plural(total, 'artifact')}")
        for why, count in collection.kept.items():
            reasons.add_row(why, f"{count:,}")
        console.print(reasons)
    if collection.unfinished:
        size = sum(size for _, size in collection.unfinished)
        console.print(
            f"kept: {plural(len(collection.unfinished), 'unfinished training')}, {size_text(size)}, which "
            "`sft run` can go on with; --older-than DAYS gives up those that are older",
            soft_wrap=True,
        )
    for note in collection.notes:
        console.print(note, style="yellow", soft_wrap=True)

"""`sft fsck`: the whole store hashed again."""

from typing import Any

from rich.console import Console
from rich.text import Text

from sft_pipeline.cli.console import ConsoleReporter, printable
from sft_pipeline.cli.sizes import plural, size_text
from sft_pipeline.inventory.fsck import StoreCheck, check
from sft_pipeline.store import Store


def check_store(*, console: Console, out: Console | None) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`."""
    with ConsoleReporter(console) as reporter:
        found = check(Store(), reporter)
    if out is not None:
        show_check(found, out)
    return found.to_json()


def show_check(found: StoreCheck, console: Console) -> None:
    """Findings with their remedies, then the sum."""
    last = ""
    for damage in found.damaged:
        console.print(Text(f"✘ {printable(damage.path)}: {printable(damage.problem)}", "red"), soft_wrap=True)
        if damage.used_by:
            console.print(f"  made from it: {', '.join(damage.used_by)}", soft_wrap=True)
        if damage.remedy != last:
            console.print(f"  remedy: {damage.remedy}", soft_wrap=True)
        last = damage.remedy
    for path in found.abandoned:
        console.print(f"abandoned, of a killed process: {path}", style="yellow", soft_wrap=True)
    if found.abandoned:
        console.print("  the next `sft run` or `sft gc` removes it, or puts it back where it is needed")
    for note in found.notes:
        console.print(note, style="yellow", soft_wrap=True)
    looked = f"{plural(found.artifacts, 'artifact')}, {plural(found.files, 'file')}, {size_text(found.bytes)}"
    if found.damaged:
        console.print(f"{looked} hashed: {plural(len(found.damaged), 'finding')}", style="bold red")
    else:
        console.print(f"{looked} hashed: nothing is damaged", style="green")

"""`sft trace`: where a row or a group went."""

from typing import Any

from rich.console import Console

from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.errors import InputError


def show_trace(group_or_row_id: str, *, console: Console, out: Console | None) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`.

    Raises:
        InputError: No artifact of the store contains it.
    """
    from sft_pipeline.lineage.show import print_trace
    from sft_pipeline.lineage.trace import trace

    with ConsoleReporter(console) as reporter:
        found = trace(group_or_row_id, report=reporter)
    if not found.found:
        raise InputError(
            f"nothing in the store has the group or row id {group_or_row_id!r}; row ids are 32 hexadecimal digits, as `sft inspect` prints them"
        )
    if out is not None:
        print_trace(found, out)
    return found.to_json()

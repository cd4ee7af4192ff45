"""`sft lineage`: the chain from an exported model back to its source files. `sft trace`: where a row went."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.errors import InputError


def show_lineage(model_dir: str, *, verify: bool, console: Console, out: Console | None) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`.

    Raises:
        InputError: The folder is not there, or is no artifact.
    """
    from sft_pipeline.lineage.show import print_chain, print_verification
    from sft_pipeline.lineage.verify import verify as verify_chain
    from sft_pipeline.lineage.walk import walk

    path = Path(os.path.realpath(os.path.expanduser(model_dir)))
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the folder of an exported model")
    if not verify:
        chain = walk(path)
        if out is not None:
            print_chain(chain, out)
        return {"chain": chain.to_json(), "verified": None}
    with ConsoleReporter(console) as reporter:
        found = verify_chain(path, report=reporter)
    if out is not None:
        if found.chain:
            print_chain(found.chain, out)
        print_verification(found, out)
    return {"chain": found.chain.to_json() if found.chain else [], **found.to_json()}


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
            f"nothing in the store has the group or row id {group_or_row_id!r}; "
            "row ids are 32 hexadecimal digits, as `sft inspect` prints them"
        )
    if out is not None:
        print_trace(found, out)
    return found.to_json()

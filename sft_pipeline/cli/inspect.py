"""`sft inspect`: rows token by token, and packed blocks with their boundaries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sft_pipeline.cli.branch import find_branch, prepared
from sft_pipeline.errors import InputError


def inspect_recipe(
    recipe: str,
    *,
    row: str | None,
    n: int,
    html: str | None,
    snapshot: str | None,
    overrides: Sequence[str],
    console: Console,
    out: Console | None,
) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`, or writes the page `html`."""
    from sft_pipeline.inspection import html_page, inspect_rows, print_inspection

    _, branch = find_branch(recipe, snapshot, overrides, console)
    with prepared(branch, "packed_shards", console) as outcomes:
        inspection = inspect_rows(
            outcomes["tokenized_rows"].artifact, outcomes["packed_shards"].artifact, row=row, n=n
        )
    result = inspection.to_json()
    if html:
        path = Path(html).resolve()
        try:
            path.write_text(html_page(inspection), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--html {html}: cannot be written: {error.strerror or error}") from None
        result["html"] = str(path)
        console.print(f"wrote {path}", soft_wrap=True)
    elif out is not None:
        print_inspection(inspection, out)
    return result

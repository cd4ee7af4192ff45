"""`sft check`: does everything fit together, and what will a training cost."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sft_pipeline.cli.branch import find_branch
from sft_pipeline.cli.prepare import prepared


def check_recipe(recipe: str, *, snapshot: str | None, overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """The JSON of the command. The data assets are brought up to date on the way: the budget is counted, not guessed."""
    raise NotImplementedError


def show_check(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    raise NotImplementedError(Table)

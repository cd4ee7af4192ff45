"""`sft init`: looks at data, and writes its dataset and recipe files."""

from pathlib import Path
from typing import Any

from rich.console import Console

from sft_pipeline.cli.preview import preview, show_preview
from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.load import config_folders


def init(path: str, *, name: str | None, base: str, into: str | None) -> dict[str, Any]:
    """The JSON of the command; writes the two files.

    Raises:
        InputError: There is no guess how the rows read, or the files are there already.
    """
    from sft_pipeline.preview.init import draft, write_files

    found = draft(path, name, base)
    folder = Path(into).resolve() if into else config_folders()[-1]
    dataset, recipe = write_files(found, folder)
    config = DatasetConfig.model_validate(found.dataset)
    return {
        "dataset": str(dataset),
        "recipe": str(recipe),
        "guessed": {
            "task": found.task,
            "source": found.dataset["sources"][0],
            "contract": found.dataset.get("contract", {}),
            "recipe": found.recipe,
            "unsure": found.unsure,
        },
        "preview": preview(config, None, 1),
    }


def show_init(result: dict[str, Any], console: Console) -> None:
    """The result for people."""
    show_preview(result["preview"], console)
    guessed = result["guessed"]
    console.print(f"the replies look like {guessed['task']}")
    for line in guessed["unsure"]:
        console.print(f"unsure: {line}", style="yellow", soft_wrap=True)
    for kind in ("dataset", "recipe"):
        console.print(f"{kind}: {result[kind]}", soft_wrap=True)
    name = guessed["recipe"]["name"]
    console.print(f"next: sft check {name}, then sft run {name}")

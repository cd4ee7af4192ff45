"""An inspection in the terminal: supervised tokens green, control tokens magenta, context dim."""

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from sft_pipeline.inspection.view import BlockView, Inspection, RowView

STYLES = {"supervised": "bold green", "special": "magenta", "context": "dim"}
_WIDTH = 72
_SHADES = ("on green4", "on dark_cyan", "on purple4", "on dark_goldenrod", "on grey37")


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints rows, then the blocks they lie in."""
    legend = (
        Text("supervised", STYLES["supervised"])
        + Text("  control token", STYLES["special"])
        + Text("  context", STYLES["context"])
    )
    console.print(Text(inspection.title + "   ", "bold") + legend)
    for row in inspection.rows:
        console.print(Panel(row_text(row), title=Text(_title(row)), title_align="left"))
    for block in inspection.blocks:
        console.print(block_text(block))


def _title(row: RowView) -> str:
    parts = [
        row.row_id,
        row.side,
        f"{len(row.input_ids)} tokens",
        f"{row.supervised} supervised",
        f"prompt {row.prompt_length}",
    ]
    if row.block is not None:
        parts.append(f"block {row.block}")
    if row.truncated:
        parts.append(f"TRUNCATED by {row.truncated} tokens")
    return " · ".join(parts)


def row_text(row: RowView) -> Text:
    """The row's text, each token in its colour; a bar before the first supervised one."""
    text = Text()
    for i, token in enumerate(row.tokens):
        kind = row.kind(i)
        style = STYLES[kind] + (" underline" if kind == "supervised" and row.special[i] else "")
        if kind == "supervised" and (i == 0 or row.kind(i - 1) != "supervised"):
            text.append("▌", "green")
        text.append(
            token.replace("\r", "␍")
            if row.kind(i) != "supervised" or token.strip("\n")
            else token.replace("\n", "⏎\n"),
            style,
        )
    if row.truncated:
        text.append(" ✂", "bold red")
    return text


def block_text(block: BlockView) -> Text:
    """The block as a bar, one shade per example, with the room that is left; then its rows."""
    text = Text(
        f"block {block.block}: {len(block.segments)} examples, {block.length} of {block.max_length} tokens\n  "
    )
    for i, segment in enumerate(block.segments):
        cells = max(round(segment.length / block.max_length * _WIDTH), 1)
        text.append("│" + " " * (cells - 1), _SHADES[i % len(_SHADES)])
    text.append("·" * max(round((block.max_length - block.length) / block.max_length * _WIDTH), 0), "dim")
    for i, segment in enumerate(block.segments):
        text.append("\n  ")
        text.append("  ", _SHADES[i % len(_SHADES)])
        text.append(
            f" {segment.row_id}  {segment.length} tokens, {segment.supervised} supervised, positions 0 to {segment.length - 1}"
        )
    return text

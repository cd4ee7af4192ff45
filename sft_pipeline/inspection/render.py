"""An inspection in the terminal, and as one HTML page that needs nothing else.

In the terminal supervised tokens are green and underlined, control tokens magenta, context dim. Without
colours, bars still say where supervision begins and ends.
"""

from pathlib import Path

from jinja2 import Environment
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from sft_pipeline.inspection.view import BlockView, Inspection, RowView, visible

STYLES = {"supervised": "bold underline green", "special": "magenta", "context": "dim"}
PAGE = Path(__file__).with_name("page.jinja")
_WIDTH = 72
_SHADES = ("white on green4", "white on blue3", "white on purple4", "white on grey37")


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Prints rows, then the blocks they lie in."""
    legend = Text("   ▌", "green").append("supervised", STYLES["supervised"]).append("▐", "green")
    legend.append("  control token", STYLES["special"]).append("  context", STYLES["context"])
    console.print(Text(inspection.title, "bold") + legend)
    for row in inspection.rows:
        console.print(Panel(row_text(row), title=Text(_title(row)), title_align="left"))
    for block in inspection.blocks:
        console.print(block_text(block))


def _title(row: RowView) -> str:
    parts = [
        visible(row.row_id),
        row.split,
        f"{len(row.input_ids)} tokens",
        f"{row.supervised} supervised",
        f"prompt {row.prompt_length}",
    ]
    if row.weighed:
        parts.append(row.weighed)
    if row.block is not None:
        parts.append(f"block {row.block}")
    if row.cut_before or row.cut_after:
        parts.append(f"✂ {row.cut_word}")
    return " · ".join(parts)


def row_text(row: RowView) -> Text:
    """The row's text, each token in its colour; bars around supervised text, scissors for missing tokens."""
    text = Text()
    if row.cut_before:
        text.append(f"✂ {row.cut_before} ", "bold red")
    before = "context"
    for i, token in enumerate(row.tokens):
        kind = row.kind(i)
        if (kind == "supervised") != (before == "supervised"):
            text.append("▌" if kind == "supervised" else "▐", "green")
        text.append(visible(token), STYLES[kind])
        before = kind
    if before == "supervised":
        text.append("▐", "green")
    if row.cut_after:
        text.append(f" ✂ {row.cut_after}", "bold red")
    text.rstrip()
    return text


def block_text(block: BlockView) -> Text:
    """The block as a bar, one shade per example, with the space that is left; then its rows."""
    some = f"{len(block.segments)} example{'s' if len(block.segments) != 1 else ''}"
    text = Text(f"{block.split} block {block.block}: {some}, {block.length} of {block.max_length} tokens\n  ")
    for i, segment in enumerate(block.segments, 1):
        cells = max(round(segment.length / block.max_length * _WIDTH), 1)
        text.append(f"│{i}"[:cells].ljust(cells), _SHADES[i % len(_SHADES)])
    text.append("·" * round(block.free / block.max_length * _WIDTH), "dim")
    for i, s in enumerate(block.segments, 1):
        text.append("\n  ").append(f"{i:>3} ", _SHADES[i % len(_SHADES)])
        text.append(f" {visible(s.row_id)}  {s.length} tokens, {s.supervised} supervised, ")
        text.append(f"positions {s.first_position} to {s.last_position}")
    return text


def html_page(inspection: Inspection) -> str:
    """The page. All text of rows is escaped."""
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["visible"] = visible
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        title=inspection.title,
        rows=inspection.rows,
        blocks=inspection.blocks,
        shown={(r.split, r.row_id) for r in inspection.rows},
        cuts=any(r.cut_before or r.cut_after for r in inspection.rows),
    )

"""Plots of the tokenized rows: lengths, and a few rows with their tokens coloured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.tokenizer import Tokenizer

SUPERVISED, CONTEXT = "#b7e4c7", "#eceff1"
_COLUMNS, _TOKENS = 196, 110  # characters in a line, tokens of a row
_WIDTH, _HEIGHT = 7, 21  # pixels of a character and of a line
_SIZE = _WIDTH / 0.602  # pixels: of DejaVu Sans Mono a character is this wide


@dataclass(frozen=True)
class Preview:
    """One row to be drawn: its tokens as text, and the colour class of each."""

    title: str
    tokens: Sequence[str]
    supervised: Sequence[bool]
    special: Sequence[bool]


def previews_of(tokenizer: Tokenizer, examples: Sequence[Mapping[str, Any]]) -> list[Preview]:
    """How examples (rows of tokenized_rows) are drawn."""
    return [
        Preview(
            title=f"row {e['row_id'][:12]}: {e['length']} tokens, {e['supervised']} supervised (green)",
            tokens=[tokenizer.decode([i]) for i in e["input_ids"]],
            supervised=[label != IGNORE_LABEL for label in e["labels"]],
            special=[i in tokenizer.control_ids for i in e["input_ids"]],
        )
        for e in examples
    ]


def plot_lengths(path: Path, lengths: npt.NDArray, supervised: npt.NDArray, max_length: int) -> None:
    """Histogram of tokens per example, and of supervised tokens per example."""
    from sft_pipeline.plots.canvas import quick_axes, save

    fig, ax = quick_axes(7, 3.2)
    longest = int(lengths.max()) if len(lengths) else 1
    width = -(-(longest + 1) // 60)  # whole tokens, the same for both
    bins = np.arange(0, longest + width + 1, width)
    ax.hist(lengths, bins=bins, histtype="stepfilled", color="#90a4ae", label="tokens")
    ax.hist(
        supervised, bins=bins, histtype="stepfilled", color="#52b788", alpha=0.75, label="supervised tokens"
    )
    ax.axvline(max_length, color="#c1121f", linewidth=1, label=f"max_length {max_length}")
    ax.locator_params(nbins=6)
    ax.set_xlabel("tokens per example")
    ax.set_ylabel("examples")
    ax.legend(frameon=False)
    save(fig, path)


def plot_masks(path: Path, previews: Sequence[Preview]) -> None:
    """Rows token by token: green is supervised, grey context, a red frame a control token.

    Drawn as pixels: the same as a matplotlib figure takes ten times as long.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    basic = ImageFont.Layout.BASIC
    mono = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), _SIZE, layout_engine=basic)
    bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), _SIZE, layout_engine=basic)
    laid_out = [_lay_out(p) for p in previews]
    lines = sum(3 + (boxes[-1].line if boxes else 0) for boxes in laid_out)
    image = Image.new("RGB", ((_COLUMNS + 4) * _WIDTH, lines * _HEIGHT + _HEIGHT // 2), "white")
    draw = ImageDraw.Draw(image)
    top = _HEIGHT // 2
    for preview, boxes in zip(previews, laid_out, strict=True):
        draw.text((2 * _WIDTH, top + _HEIGHT // 2), preview.title, "black", bold, anchor="lm")
        for box in boxes:
            x, y = (2 + box.x) * _WIDTH, top + (1 + box.line) * _HEIGHT
            place = (x - 1, y + 2, x + len(box.text) * _WIDTH, y + _HEIGHT - 2)
            draw.rectangle(
                place, SUPERVISED if box.supervised else CONTEXT, "#a4161a" if box.special else None
            )
            draw.text((x, y + _HEIGHT // 2), box.text, "black", mono, anchor="lm")
        top += (3 + (boxes[-1].line if boxes else 0)) * _HEIGHT
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@dataclass(frozen=True)
class _Box:
    """A token's place in the picture, in characters and lines."""

    text: str
    x: int
    line: int
    supervised: bool
    special: bool


def _lay_out(preview: Preview) -> list[_Box]:
    """Boxes filled line by line, around the first supervised token."""
    first = next((i for i, s in enumerate(preview.supervised) if s), 0)
    start = max(min(first - _TOKENS // 3, len(preview.tokens) - _TOKENS), 0)
    boxes: list[_Box] = []
    x = line = 0
    for i in range(start, min(start + _TOKENS, len(preview.tokens))):
        text = visible(preview.tokens[i])[:40]
        if x + len(text) > _COLUMNS:
            x, line = 0, line + 1
        boxes.append(_Box(text, x, line, preview.supervised[i], preview.special[i]))
        x += len(text) + 1
    return boxes


def visible(token: str) -> str:
    """A token's text with its white space made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍").replace(" ", "·") or "∅"

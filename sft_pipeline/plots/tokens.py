"""Plots of tokenized rows: lengths, and a few rows with their tokens coloured."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sft_pipeline.tables.schemas import IGNORE_LABEL

SUPERVISED, CONTEXT, CONTROL = "#b7e4c7", "#eceff1", "#a4161a"
_COLUMNS, _TOKENS = 196, 110  # characters in a line, tokens drawn of a row
_WIDTH, _HEIGHT = 7, 21  # pixels of a character and of a line
_SIZE = _WIDTH / 0.602  # font size in pixels: a character of DejaVu Sans Mono is 0.602 times as wide
_VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍", " ": "·"})


def plot_lengths(
    path: Path, lengths: npt.NDArray[np.int32], supervised: npt.NDArray[np.int32], max_length: int
) -> None:
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


def plot_masks(
    path: Path,
    examples: Sequence[Mapping[str, Any]],
    decode: Callable[[Sequence[int]], str],
    control_ids: frozenset[int],
) -> None:
    """Rows token by token: green is supervised, grey context, a red frame a control token.

    Drawn with Pillow: the same as a matplotlib figure takes ten times as long.

    Args:
        examples: Rows of tokenized_rows.
        decode: Ids as text, control tokens included.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    basic = ImageFont.Layout.BASIC
    mono = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), _SIZE, layout_engine=basic)
    bold = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), _SIZE, layout_engine=basic)
    laid_out = [_lay_out(example, decode) for example in examples]
    lines = [1 + (boxes[-1][2] if boxes else 0) for boxes in laid_out]
    height = sum(n + 2 for n in lines) * _HEIGHT + _HEIGHT // 2
    image = Image.new("RGB", ((_COLUMNS + 4) * _WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    top = _HEIGHT // 2
    for example, boxes, count in zip(examples, laid_out, lines, strict=True):
        title = f"row {example['row_id'][:12]}: {example['length']} tokens, "
        title += f"{example['supervised']} supervised (green)"
        draw.text((2 * _WIDTH, top + _HEIGHT // 2), title, "black", bold, anchor="lm")
        for text, column, line, token in boxes:
            x, y = (2 + column) * _WIDTH, top + (1 + line) * _HEIGHT
            fill = SUPERVISED if example["labels"][token] != IGNORE_LABEL else CONTEXT
            frame = CONTROL if example["input_ids"][token] in control_ids else None
            draw.rectangle((x - 1, y + 2, x + len(text) * _WIDTH, y + _HEIGHT - 2), fill, frame)
            draw.text((x, y + _HEIGHT // 2), text, "black", mono, anchor="lm")
        top += (count + 2) * _HEIGHT
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _lay_out(
    example: Mapping[str, Any], decode: Callable[[Sequence[int]], str]
) -> list[tuple[str, int, int, int]]:
    """(text, column, line, index) of each token that is drawn, around the first supervised one."""
    ids, labels = example["input_ids"], example["labels"]
    first = next((i for i, label in enumerate(labels) if label != IGNORE_LABEL), 0)
    start = max(min(first - _TOKENS // 3, len(ids) - _TOKENS), 0)
    boxes: list[tuple[str, int, int, int]] = []
    column = line = 0
    for i in range(start, min(start + _TOKENS, len(ids))):
        text = decode([ids[i]]).translate(_VISIBLE)[:40] or "∅"
        if column + len(text) > _COLUMNS:
            column, line = 0, line + 1
        boxes.append((text, column, line, i))
        column += len(text) + 1
    return boxes

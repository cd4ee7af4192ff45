"""Plots of the tokenized rows: lengths, and a few rows with their tokens coloured."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sft_pipeline.stages.tokenized_rows.encode import IGNORE
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer

SUPERVISED, CONTEXT, SPECIAL = "#b7e4c7", "#eceff1", "#e4b7e0"
_COLUMNS, _TOKENS = 196, 110  # each token is a box, at about a millisecond


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
            supervised=[label != IGNORE for label in e["labels"]],
            special=[i in tokenizer.control_ids for i in e["input_ids"]],
        )
        for e in examples
    ]


def plot_lengths(path: Path, lengths: npt.NDArray, supervised: npt.NDArray, max_length: int) -> None:
    """Histogram of tokens per example, and of supervised tokens per example."""
    from sft_pipeline.figures import axes, save

    fig, ax = axes(7, 3.2)
    bins = min(60, max(int(lengths.max()), 2)) if len(lengths) else 10
    ax.hist(lengths, bins=bins, color="#90a4ae", label="tokens")
    ax.hist(supervised, bins=bins, color="#52b788", alpha=0.75, label="supervised tokens")
    ax.axvline(max_length, color="#c1121f", linewidth=1, label=f"max_length {max_length}")
    ax.set_xlabel("tokens per example")
    ax.set_ylabel("examples")
    ax.legend(frameon=False)
    save(fig, path)


def plot_masks(path: Path, previews: Sequence[Preview]) -> None:
    """Rows token by token: green is supervised, grey context, a magenta frame a control token."""
    from sft_pipeline.figures import blank, save

    laid_out = [(p, _lay_out(p)) for p in previews]
    lines = sum(rows + 2 for _, (_, rows) in laid_out) + 1
    fig = blank(12, 0.19 * lines + 0.3, laid_out=False)
    ax = fig.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.set_xlim(0, _COLUMNS + 2)
    ax.set_ylim(lines, 0)
    ax.axis("off")
    top = 1.0
    for preview, (boxes, rows) in laid_out:
        ax.text(0, top, preview.title, fontsize=8, weight="bold", va="center", parse_math=False)
        for text, x, y, supervised, special in boxes:
            style = {
                "boxstyle": "round,pad=0.12",
                "facecolor": SUPERVISED if supervised else CONTEXT,
                "edgecolor": "#a4161a" if special else "none",
                "linewidth": 0.6,
            }
            ax.text(
                x,
                top + 1 + y,
                text,
                fontsize=6.4,
                family="monospace",
                va="center",
                bbox=style,
                parse_math=False,
                clip_on=True,
            )
        top += rows + 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks are drawn as boxes
        save(fig, path)


def _lay_out(preview: Preview) -> tuple[list[tuple[str, float, int, bool, bool]], int]:
    """Boxes (text, x, line, supervised, special) filled line by line, and the number of lines."""
    first = next((i for i, s in enumerate(preview.supervised) if s), 0)
    start = max(min(first - _TOKENS // 3, len(preview.tokens) - _TOKENS), 0)
    boxes, x, line = [], 0.0, 0
    for i in range(start, min(start + _TOKENS, len(preview.tokens))):
        text = visible(preview.tokens[i])[:40]
        width = len(text) + 0.8
        if x + width > _COLUMNS:
            x, line = 0.0, line + 1
        boxes.append((text, x, line, preview.supervised[i], preview.special[i]))
        x += width
    return boxes, line + 1


def visible(token: str) -> str:
    """A token's text with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "·") or "∅"

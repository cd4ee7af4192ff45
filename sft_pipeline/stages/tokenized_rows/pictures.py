"""Plots of the tokenized rows: lengths, and a few rows with their tokens coloured."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from sft_pipeline.stages.tokenized_rows.encode import IGNORE
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer

SUPERVISED, CONTEXT, SPECIAL = "#b7e4c7", "#eceff1", "#e4b7e0"
_COLUMNS, _TOKENS = 196, 110  # characters in a line, tokens of a row
_CHARACTER = 7 / 110  # inches a character is wide: whole pixels, to which glyphs are fitted
_SIZE = _CHARACTER * 72 / 0.602  # points, in DejaVu Sans Mono, the default monospaced font
_LINE = 0.19  # inches
_AS_WIDE = frozenset(map(chr, range(32, 127))) | frozenset("·↵⇥∅")  # what that font has


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
    from sft_pipeline.figures import quick_axes, save

    fig, ax = quick_axes(7, 3.2)
    bins = min(60, max(int(lengths.max()), 2)) if len(lengths) else 10
    ax.hist(lengths, bins=bins, color="#90a4ae", label="tokens")
    ax.hist(supervised, bins=bins, color="#52b788", alpha=0.75, label="supervised tokens")
    ax.axvline(max_length, color="#c1121f", linewidth=1, label=f"max_length {max_length}")
    ax.set_xlabel("tokens per example")
    ax.set_ylabel("examples")
    ax.legend(frameon=False)
    save(fig, path)


def plot_masks(path: Path, previews: Sequence[Preview]) -> None:
    """Rows token by token: green is supervised, grey context, a magenta frame a control token.

    A line is one text over boxes that are drawn together: a box with a text of its own per token takes ten times as long.
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    from sft_pipeline.figures import blank, save

    laid_out = [_lay_out(p) for p in previews]
    lines = sum(2 + boxes[-1].line for boxes in laid_out if boxes) + len(laid_out)
    width = (_COLUMNS + 4) * _CHARACTER
    fig = blank(width, _LINE * lines + 0.3, laid_out=False)
    ax = fig.add_axes((0, 0.01, 1, 0.98))
    ax.set_xlim(-2, _COLUMNS + 2)
    ax.set_ylim(lines, 0)
    ax.axis("off")
    top = 1.0
    for preview, boxes in zip(previews, laid_out, strict=True):
        ax.text(0, top, preview.title, fontsize=8, weight="bold", va="center", parse_math=False)
        drawn = [Rectangle((b.x, top + 1 + b.line - 0.4), len(b.text), 0.8) for b in boxes]
        colours = [SUPERVISED if b.supervised else CONTEXT for b in boxes]
        edges = ["#a4161a" if b.special else "none" for b in boxes]
        ax.add_collection(PatchCollection(drawn, facecolors=colours, edgecolors=edges, linewidths=0.6))
        for x, line, text in _runs(boxes):
            ax.text(x, top + 1 + line, text, fontsize=_SIZE, family="monospace", va="center", parse_math=False)  # fmt: skip
        top += 2 + (boxes[-1].line if boxes else 0) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font lacks are drawn as boxes
        save(fig, path)


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


def _runs(boxes: Sequence[_Box]) -> Iterator[tuple[int, int, str]]:
    """(x, line, text) of what can be drawn as one text: behind characters of another font, the next token has a new place."""
    run: list[_Box] = []
    for box in boxes:
        if run and (box.line != run[-1].line or not _AS_WIDE.issuperset(run[-1].text)):
            yield run[0].x, run[0].line, " ".join(b.text for b in run)
            run = []
        run.append(box)
    if run:
        yield run[0].x, run[0].line, " ".join(b.text for b in run)


def visible(token: str) -> str:
    """A token's text with its white space made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍").replace(" ", "·") or "∅"

"""What an inspection holds: rows with their tokens, blocks with their segments; and how text is shown."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sft_pipeline.tables.schemas import IGNORE_LABEL


@dataclass(frozen=True)
class RowView:
    """One example, token by token.

    Attributes:
        tokens: The text of each token; together they are the row's text. Where a character takes several
            tokens, the last one has it and the others are empty.
        labels: The input id where the token carries loss, else -100.
        weights: What each token counts for in the loss; None where every one with a label counts 1.
        special: Whether the token is one of the tokenizer's control tokens.
        prompt_length: Tokens of the prompt that a server would send.
        truncated: Tokens of the row that are not here.
        overflow: What the recipe does with rows that are too long.
        block: The packed block that holds the example, None where it was not packed.
    """

    row_id: str
    group: str
    split: str
    tokens: Sequence[str]
    input_ids: Sequence[int]
    labels: Sequence[int]
    weights: Sequence[float] | None
    special: Sequence[bool]
    prompt_length: int
    truncated: int
    completion: str
    overflow: str
    block: int | None = None

    @property
    def position_ids(self) -> list[int]:
        return list(range(len(self.input_ids)))

    @property
    def cut_word(self) -> str:
        """Where tokens are missing, how that came."""
        return "split" if self.overflow == "split" else "truncated"

    @property
    def cut_before(self) -> str:
        """What is missing in front of the first token, in words; empty where nothing is."""
        # Further parts of a row that was split are named "<row id>/1", ...
        part = self.row_id.partition("/")[2]
        if part:
            return f"part {int(part) + 1} of a row that was split; the part before overlaps"
        if self.truncated and self.overflow == "truncate_prompt":
            return f"the prompt is shorter by {_tokens(self.truncated)}"
        return ""

    @property
    def cut_after(self) -> str:
        """What is missing behind the last token, in words; empty where nothing is."""
        if not self.truncated or self.overflow == "truncate_prompt":
            return ""
        where = "in the next part" if self.overflow == "split" else "of the answer left out"
        return f"{_tokens(self.truncated)} {where}"

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE_LABEL for label in self.labels)

    @property
    def weighed(self) -> str:
        """What the supervised tokens count for, in words: "weights 0.25, 1"; empty where all count 1."""
        if self.weights is None:
            return ""
        return "weights " + ", ".join(f"{w:g}" for w in sorted({*self.weights} - {0}))

    def kind(self, index: int) -> str:
        """ "supervised", "special" (a control token without loss) or "context"."""
        if self.labels[index] != IGNORE_LABEL:
            return "supervised"
        return "special" if self.special[index] else "context"


@dataclass(frozen=True)
class Segment:
    """One example within a block, with the position ids of its first and its last token."""

    row_id: str
    length: int
    supervised: int
    first_position: int
    last_position: int


@dataclass(frozen=True)
class BlockView:
    """One packed block: its examples in order, and the space that is left."""

    block: int
    split: str
    segments: Sequence[Segment]
    max_length: int

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def free(self) -> int:
        return self.max_length - self.length


@dataclass(frozen=True)
class Inspection:
    """Rows and the blocks they lie in."""

    title: str
    rows: Sequence[RowView]
    blocks: Sequence[BlockView]

    def to_json(self) -> dict[str, Any]:
        """The form of `sft inspect --json`."""
        return {
            "title": self.title,
            "rows": [
                {
                    "row_id": r.row_id,
                    "group": r.group,
                    "side": r.split,
                    "tokens": list(r.tokens),
                    "input_ids": list(r.input_ids),
                    "labels": list(r.labels),
                    "weights": None if r.weights is None else list(r.weights),
                    "position_ids": r.position_ids,
                    "special": list(r.special),
                    "prompt_length": r.prompt_length,
                    "supervised": r.supervised,
                    "truncated": r.truncated,
                    "completion": r.completion,
                    "block": r.block,
                }
                for r in self.rows
            ],
            "blocks": [
                {
                    "block": b.block,
                    "side": b.split,
                    "length": b.length,
                    "max_length": b.max_length,
                    "segments": [asdict(s) for s in b.segments],
                }
                for b in self.blocks
            ],
        }


_CONTROL = (*range(32), *range(0x7F, 0xA0), 0x200B, 0x2028, 0x2029, 0xFEFF)
_DIRECTION = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A))  # of writing
_TABLE = str.maketrans({chr(c): f"⟨U+{c:04X}⟩" for c in (*_CONTROL, *_DIRECTION)} | {"\n": "⏎\n", "\t": "⇥"})


def visible(text: str) -> str:
    """Text of a row as people can see it: nothing in it moves a cursor, turns the writing, or is invisible.

    A line break still breaks the line; a token of spaces alone is written as dots.
    """
    return (text.replace(" ", "·") if not text.strip(" ") else text).translate(_TABLE)


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count != 1 else ''}"

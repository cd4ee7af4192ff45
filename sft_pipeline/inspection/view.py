"""What an inspection holds: rows with their tokens, and blocks with their segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORE = -100


@dataclass(frozen=True)
class RowView:
    """One example, token by token.

    Attributes:
        tokens: The text of each token; bytes that are no whole character show as the replacement character.
        labels: The input id where the token carries loss, else -100.
        special: Whether the token is one of the tokenizer's control tokens.
        prompt_length: Tokens of the prompt that a server would send.
        truncated: Tokens of the row that are not here.
        block: The packed block that holds the example, None where it was not packed.
    """

    row_id: str
    group: str
    side: str
    tokens: Sequence[str]
    input_ids: Sequence[int]
    labels: Sequence[int]
    special: Sequence[bool]
    prompt_length: int
    truncated: int
    completion: str
    block: int | None = None

    @property
    def position_ids(self) -> list[int]:
        return list(range(len(self.input_ids)))

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)

    def kind(self, index: int) -> str:
        """ "supervised", "special" (a control token without loss) or "context"."""
        if self.labels[index] != IGNORE:
            return "supervised"
        return "special" if self.special[index] else "context"


@dataclass(frozen=True)
class Segment:
    """One example within a block."""

    row_id: str
    length: int
    supervised: int


@dataclass(frozen=True)
class BlockView:
    """One packed block: its examples in order, and the room that is left."""

    block: int
    segments: Sequence[Segment]
    max_length: int

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)


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
                    "side": r.side,
                    "tokens": list(r.tokens),
                    "input_ids": list(r.input_ids),
                    "labels": list(r.labels),
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
                    "length": b.length,
                    "max_length": b.max_length,
                    "segments": [
                        {"row_id": s.row_id, "length": s.length, "supervised": s.supervised}
                        for s in b.segments
                    ],
                }
                for b in self.blocks
            ],
        }

"""Which tokens carry loss, derived twice.

(a) From characters: the offsets of the encoding say which token covers a span's first and last character.
(b) From tokens alone: a control token always splits the text, so the tokens before a character are those up
    to the last control token before it (found by counting control tokens) plus the tokens of what lies
    between.

Both must name the same tokens, and (b) must find its tokens where the row has them, or the row is rejected.
"""

import bisect
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from sft_pipeline.stages.tokenized_rows.rendering import Span
from sft_pipeline.text.tokenizer import Piece, Tokenizer


@dataclass(frozen=True)
class EncodedRow:
    """One row's ids: the prompt that a server would send, and apart from it what follows.

    Encoding the two apart keeps a token from forming across the boundary, which no server would ever see.
    """

    tokenizer: Tokenizer
    prompt: Piece
    rest: Piece

    @cached_property
    def ids(self) -> list[int]:
        return self.prompt.ids + self.rest.ids

    @cached_property
    def _control_tokens(self) -> tuple[tuple[list[int], list[int]], ...]:
        return tuple(
            (
                [match.end() for match in self.tokenizer.control_pattern.finditer(piece.text)],
                [i for i, token in enumerate(piece.ids) if token in self.tokenizer.control_ids],
            )
            for piece in (self.prompt, self.rest)
        )

    def control_tokens(self, piece: Piece) -> tuple[list[int], list[int]]:
        """(where each control token of a piece ends in its text, where each stands in its ids)."""
        return self._control_tokens[0 if piece is self.prompt else 1]

    def locate(self, char: int) -> tuple[Piece, int, int]:
        """(piece, tokens before the piece, character within the piece) of a character of the row's text."""
        if char < len(self.prompt.text):
            return self.prompt, 0, char
        return self.rest, len(self.prompt.ids), char - len(self.prompt.text)


def tokens_by_offsets(row: EncodedRow, span: Span) -> Span | None:
    """(a) The tokens of a character span, by the encoding's offsets. None where a character has no token."""
    piece, base, char = row.locate(span[0])
    start = piece.token_at(char)
    piece, last_base, char = row.locate(span[1] - 1)
    end = piece.token_at(char)
    while end is None and char > 0 and unicodedata.combining(piece.text[char]):
        char -= 1  # a normalizer has composed it with the character before
        end = piece.token_at(char)
    if start is None or end is None:
        return None
    # A character of several tokens (bytes of an emoji) is looked up as its first: take in the others.
    while end + 1 < len(piece.ids) and _covers(piece, end + 1, char):
        end += 1
    return base + start, last_base + end + 1


def _covers(piece: Piece, token: int, char: int) -> bool:
    """Whether a token begins at a character of the piece, or before it."""
    chars = piece.encoding.token_to_chars(token + piece.skip_tokens)
    return chars is not None and chars[0] <= char + piece.skip_chars


def tokens_by_prefix(row: EncodedRow, span: Span) -> Span | None:
    """(b) The tokens of a character span, by the number of tokens before its ends. None where unknown."""
    start = _tokens_before(row, *row.locate(span[0]))
    piece, base, last = row.locate(span[1] - 1)  # the end may be that of the prompt: look from inside
    end = _tokens_before(row, piece, base, last + 1)
    return None if start is None or end is None else (start, end)


def _tokens_before(row: EncodedRow, piece: Piece, base: int, char: int) -> int | None:
    """Tokens of the row before a character of one of its pieces; None where a token spans that boundary."""
    tokenizer = row.tokenizer
    if char == 0:
        return base
    ends, places = row.control_tokens(piece)
    before = bisect.bisect_right(ends, char)  # control tokens before the character
    if not before:
        if char == len(piece.text):
            return base + len(piece.ids)
        known = (
            tokenizer.ids(piece.text[:char])
            if base == 0
            else tokenizer.continue_batch([piece.text[:char]], [row.prompt.ids[-1]])[0].ids
        )
        return base + len(known) if piece.ids[: len(known)] == known else None
    if len(places) < before:
        return None
    after = places[before - 1] + 1
    tail = piece.text[ends[before - 1] : char]
    if tail:
        known = list(tokenizer.tail_ids(tokenizer.tokens[piece.ids[after - 1]] or "", tail))
        if piece.ids[after : after + len(known)] != known:
            return None
        after += len(known)
    return base + after


def control_tokens_match(row: EncodedRow) -> bool:
    """Whether the control tokens among the ids are exactly those that stand in the text, in order.

    The text's own were placed by the template: `ForgeryGuard` has made sure that no message holds one.
    """
    tokenizer = row.tokenizer
    for piece in (row.prompt, row.rest):
        placed = [tokenizer.control[t] for t in tokenizer.control_pattern.findall(piece.text)]
        if placed != [i for i in piece.ids if i in tokenizer.control_ids]:
            return False
    return True


def decoding_errors(tokenizer: Tokenizer, turns: Sequence[tuple[list[int], Span, str]]) -> list[str | None]:
    """For each turn None where decoding its tokens gives its text, else what it gives instead.

    Tokenizers with a canonical-composition normalizer (Qwen's NFC) give canonically equal text.
    SentencePiece-style ones write a word's leading space as part of its token, so a span is also decoded
    behind its left neighbour.

    Args:
        turns: (ids of the row, tokens of the turn, text of the turn).
    """
    decoded = tokenizer.decode_batch([ids[start:stop] for ids, (start, stop), _ in turns])
    errors: list[str | None] = []
    for (ids, (start, stop), text), alone in zip(turns, decoded, strict=True):
        good = _same(alone, text)
        if not good:
            before = ids[max(start - 1, 0) : start]
            behind = tokenizer.decode(before + ids[start:stop]).removeprefix(tokenizer.decode(before))
            good = _same(behind, text)
        errors.append(None if good else alone)
    return errors


def _same(a: str, b: str) -> bool:
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)

"""Proof that the supervised tokens say what they should: decoded, they are the text that the template emitted."""

import unicodedata
from collections.abc import Sequence

from sft_pipeline.stages.tokenized_rows.rendering import Span
from sft_pipeline.text.tokenizer import Tokenizer

Job = tuple[list[int], Span, str]
"""(ids of the row, tokens of the turn, text of the turn)"""


def decodes_to(tokenizer: Tokenizer, jobs: Sequence[Job]) -> list[str | None]:
    """For each job None where decoding gives the text, else what it gives instead.

    Tokenizers with a canonical-composition normalizer (Qwen's NFC) give canonically equal text. SentencePiece-style
    ones write a word's leading space as part of its token, so a span is also decoded behind its left neighbour.
    """
    decoded = tokenizer.decode_batch([ids[start:stop] for ids, (start, stop), _ in jobs])
    return [
        None if _same(found, text) or _same(_behind(tokenizer, ids, *span), text) else found
        for (ids, span, text), found in zip(jobs, decoded, strict=True)
    ]


def _behind(tokenizer: Tokenizer, ids: list[int], start: int, stop: int) -> str:
    before = ids[max(start - 1, 0) : start]
    return tokenizer.decode(before + ids[start:stop]).removeprefix(tokenizer.decode(before))


def _same(a: str, b: str) -> bool:
    return a == b or unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)

"""How a branch speaks: what ends a reply, and text from ids, as tokenized_rows recorded them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Speech:
    """How prompts become replies.

    Attributes:
        stop_ids: Tokens that end a reply.
        stop_text: Where a template ends turns with text of several tokens: that text; the reply is cut before it.
        pad_id: Any id of the vocabulary.
        decode: Ids as text, special tokens left out, as servers show it.
    """

    stop_ids: frozenset[int]
    pad_id: int
    decode: Callable[[Sequence[int]], str]
    stop_text: str | None = None


def formatting_of(tokenized: Artifact) -> dict[str, Any]:
    """formatting.json."""
    return json.loads(tokenized.file("formatting.json").read_text(encoding="utf-8"))


def tokenizer_of(tokenized: Artifact) -> Tokenizer:
    """The tokenizer that made these rows.

    Raises:
        InputError: Its files have changed since.
    """
    source = tokenized.manifest.config["tokenizer"]
    tokenizer = load_tokenizer(source, tokenized.manifest.config["revision"])
    recorded = formatting_of(tokenized)["tokenizer_sha256"]
    if tokenizer.sha256 != recorded:
        raise InputError(
            f"tokenizer {source}: its files are not those that {tokenized.manifest.asset} was made with; materialize it again"
        )
    return tokenizer


def speech_of(tokenized: Artifact) -> Speech:
    """How the rows of this artifact are spoken.

    Raises:
        InputError: The tokenizer's files have changed since.
    """
    formatting = formatting_of(tokenized)
    backend = tokenizer_of(tokenized).backend
    stop_ids = frozenset(formatting["stop_token_ids"])
    pad = formatting["pad_token_id"]
    return Speech(
        stop_ids=stop_ids,
        pad_id=pad if pad is not None else min(stop_ids, default=0),
        decode=lambda ids: backend.decode(list(ids), skip_special_tokens=True),
        stop_text=formatting["stop_text"] if formatting["stop_token_id"] is None else None,
    )

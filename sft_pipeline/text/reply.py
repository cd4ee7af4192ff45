"""From generated ids to a reply's text: what ends a reply, and what the template puts around it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer


def formatting_of(tokenized: Artifact) -> dict[str, Any]:
    """formatting.json of tokenized_rows.

    Raises:
        InputError: It cannot be read.
    """
    path = tokenized.file("formatting.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable ({error}). Delete the artifact's folder to have it rebuilt"
        ) from error


def stops_and_padding(formatting: Mapping[str, Any]) -> tuple[frozenset[int], int]:
    """(the tokens that end a reply, the id to pad with: any of the vocabulary) by formatting.json."""
    stop_ids = frozenset(formatting["stop_token_ids"])
    pad = formatting["pad_token_id"]
    return stop_ids, pad if pad is not None else min(stop_ids, default=0)


def tokenizer_of(tokenized: Artifact) -> Tokenizer:
    """The tokenizer that made these rows.

    Raises:
        InputError: Its files have changed since.
    """
    source = tokenized.manifest.config["tokenizer"]
    tokenizer = load_tokenizer(source, tokenized.manifest.config["revision"])
    if tokenizer.sha256 != formatting_of(tokenized)["tokenizer_sha256"]:
        raise InputError(
            f"tokenizer {source}: its files are not those that {tokenized.manifest.asset} was made with; "
            "materialize it again"
        )
    return tokenizer


@dataclass(frozen=True)
class ReplyDecoder:
    """Decodes replies to the prompts of tokenized rows.

    Attributes:
        stop_ids: Tokens that end a reply.
        pad_id: Any id of the vocabulary.
        decode: Ids as text, special tokens left out, as servers show it.
        stop_text: Where a template ends turns with text of several tokens: that text; the reply is cut before
            it.
    """

    stop_ids: frozenset[int]
    pad_id: int
    decode: Callable[[Sequence[int]], str]
    stop_text: str | None = None

    @classmethod
    def of(cls, tokenized: Artifact) -> "ReplyDecoder":
        """The decoder for the rows of a tokenized_rows artifact.

        Raises:
            InputError: The tokenizer's files have changed since.
        """
        formatting = formatting_of(tokenized)
        backend = tokenizer_of(tokenized).backend
        stop_ids, pad_id = stops_and_padding(formatting)
        return cls(
            stop_ids=stop_ids,
            pad_id=pad_id,
            decode=lambda ids: backend.decode(list(ids), skip_special_tokens=True),
            stop_text=formatting["stop_text"] if formatting["stop_token_id"] is None else None,
        )

    def expected(self, target: Sequence[int], completion: str) -> str:
        """What a reply is compared with: the completion, or without one (tool calls alone) the whole turn.

        Args:
            target, completion: As in `reply`.
        """
        if completion:
            return completion
        end = next((i for i, token in enumerate(target) if token in self.stop_ids), len(target))
        text = self.decode(target[:end])
        return text.partition(self.stop_text)[0] if self.stop_text else text

    def reply(
        self, ids: Sequence[int], finished: bool, *, target: Sequence[int], completion: str
    ) -> tuple[str, bool]:
        """(the reply as text, whether it ended by itself).

        What the template itself puts around every answer (an empty thinking block, say) is removed: the model
        was trained to write it, and the expected completion is without it.

        Args:
            ids: What was generated, without the stop token.
            finished: Whether a stop token ended it.
            target: The ids that follow the prompt in the training row.
            completion: The final message's text, which `target` contains; "" for tool calls alone, where the
                reply is all that was generated.
        """
        text = self.decode(ids)
        if self.stop_text and self.stop_text in text:
            text, finished = text.partition(self.stop_text)[0], True
        if completion:
            before, found, after = self.decode(target).partition(completion)
            if found and before.strip():
                text = text.removeprefix(before)
            if found and after.strip():
                text = text.removesuffix(after)
        return text, finished

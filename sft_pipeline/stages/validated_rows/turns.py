"""Turns arranged as the contract asks for, before a conversation is judged by it."""

from collections import Counter

from sft_pipeline.stages.validated_rows.config import ContractConfig
from sft_pipeline.stages.validated_rows.normalized_row import EMPTY_MESSAGE, Message

_PLAIN = {"role", "content", "weight"}


def arrange(messages: list[Message], contract: ContractConfig) -> tuple[list[Message], Counter[str]]:
    """The conversation as `contract` has it arranged, and how many turns each rule has merged or left out.

    First consecutive turns are merged, then turns are left out at the beginning and at the end. Turns with a
    reason to be rejected (no role, or a content that is no text) stay.
    """
    counts: Counter[str] = Counter()
    if contract.merge_consecutive:
        merged: list[Message] = []
        for message in messages:
            if merged and _can_merge(merged[-1], message):
                merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n{message['content']}"}
            else:
                merged.append(message)
        counts["merge_consecutive"] = len(messages) - len(merged)
        messages = merged
    if contract.drop_leading_assistant:
        start = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
        end = start
        while end < len(messages) and messages[end]["role"] == "assistant":
            end += 1
        counts["drop_leading_assistant"] = end - start
        messages = [*messages[:start], *messages[end:]]
    if contract.trim_trailing_user:
        end = len(messages)
        while end and messages[end - 1]["role"] in ("user", "tool", "system"):
            end -= 1
        if end:  # a conversation without any reply is rejected as it is
            counts["trim_trailing_user"] = len(messages) - end
            messages = messages[:end]
    return messages, +counts


def _can_merge(a: Message, b: Message) -> bool:
    """Both are plain text of one role and weight."""
    others = EMPTY_MESSAGE.keys() - _PLAIN
    return (
        bool(a["role"])
        and a["role"] == b["role"] != "tool"
        and a["content"] is not None
        and b["content"] is not None
        and a["weight"] == b["weight"]
        and all(m[name] is None for m in (a, b) for name in others)
    )

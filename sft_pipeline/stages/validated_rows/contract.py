"""The row contract: what a conversation must be for a model to learn from it, and what is worth a warning."""

import re
from typing import Any

from sft_pipeline.stages.validated_rows.config import ContractConfig
from sft_pipeline.stages.validated_rows.formats import MISSING, Conversation, Message
from sft_pipeline.stages.validated_rows.quarantine import Reason

# Control tokens of the families in use. In a text one of these would forge a turn if it were tokenized as itself.
CONTROL_TOKEN = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>"  # ChatML, Llama 3, Phi, GPT-NeoX and many more
    r"|<｜[^｜>]{1,40}｜>"  # DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_(?:turn|image)>"  # SentencePiece families, Gemma
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS)\]|\[TOOL_CALLS\]|<</?SYS>>"  # Llama 2, Mistral
    r"|</?(?:think|tool_call|tool_response|tools)>"  # Qwen
)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# What may follow what; None is the beginning.
_FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant"),
}


def judge(conversation: Conversation, contract: ContractConfig) -> None:
    """Adds to the conversation's reasons everything in which it breaks the contract."""
    messages = conversation.messages
    if not messages and conversation.reasons:
        return
    if all(m["role"] for m in messages) and not _alternates(messages):
        conversation.refuse(Reason.ROLES_DO_NOT_ALTERNATE)
    if not messages or messages[-1]["role"] not in ("assistant", ""):
        conversation.refuse(Reason.NO_FINAL_COMPLETION)
        _judge_prompt(conversation, messages, contract)
    else:
        _judge_prompt(conversation, messages[:-1], contract)
        _judge_completion(conversation, messages[-1], contract)


def _alternates(messages: list[Message]) -> bool:
    before = None
    called = False
    for message in messages:
        role = message["role"]
        if role not in _FOLLOWS[before] and not (before == "assistant" and called and role == "tool"):
            return False
        before, called = role, bool(message["tool_calls"])
    return True


def _judge_prompt(conversation: Conversation, messages: list[Message], contract: ContractConfig) -> None:
    if any(m["content"] is None for m in messages):
        return
    spoken = [m for m in messages if m["role"] != "system"]
    length = sum(len(m["content"]) + len(m["tool_calls"] or "") for m in messages)
    if not any(m["content"].strip() for m in spoken):
        if contract.min_prompt_chars:
            conversation.refuse(Reason.EMPTY_PROMPT)
    elif any(not m["content"].strip() and not m["tool_calls"] and m["role"] != "tool" for m in spoken):
        conversation.refuse(Reason.EMPTY_MESSAGE)
    elif length < contract.min_prompt_chars:
        conversation.refuse(Reason.PROMPT_TOO_SHORT)
    if length > contract.max_prompt_chars:
        conversation.refuse(Reason.PROMPT_TOO_LONG)


def _judge_completion(conversation: Conversation, message: Message, contract: ContractConfig) -> None:
    if message["content"] is None:
        return
    length = len(message["content"]) + len(message["tool_calls"] or "")
    if not message["content"].strip() and not message["tool_calls"]:
        conversation.refuse(Reason.EMPTY_COMPLETION)
    elif length < contract.min_completion_chars:
        conversation.refuse(Reason.COMPLETION_TOO_SHORT)
    if length > contract.max_completion_chars:
        conversation.refuse(Reason.COMPLETION_TOO_LONG)


def warnings_of(messages: list[Message]) -> list[str]:
    """Control tokens that stand literally in the text, and control characters; sorted."""
    found: set[str] = set()
    for message in messages:
        for text in (message["content"], message["tool_calls"]):
            if text:
                found.update(f"control_token:{token}" for token in CONTROL_TOKEN.findall(text))
                if _CONTROL_CHARACTER.search(text):
                    found.add("control_character")
    return sorted(found)


def group_of(value: Any) -> str | Reason | None:
    """The group key as text (whole numbers too); None where there is none; a reason where it is no key."""
    if isinstance(value, str):
        return value.strip() or None
    if value is MISSING or value is None:
        return None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else Reason.WRONG_TYPE

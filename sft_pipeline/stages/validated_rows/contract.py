"""The row contract: what a conversation must be for a model to learn from it, and what is worth a warning."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

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
_EITHER = f"{CONTROL_TOKEN.pattern}|{_CONTROL_CHARACTER.pattern}"

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
    if not _alternates(messages):
        conversation.refuse(Reason.ROLES_DO_NOT_ALTERNATE)
    if not messages or messages[-1]["role"] not in ("assistant", ""):
        conversation.refuse(Reason.NO_FINAL_COMPLETION)
        _judge_prompt(conversation, messages, contract)
    else:
        _judge_prompt(conversation, messages[:-1], contract)
        _judge_completion(conversation, messages[-1], contract)


def _alternates(messages: list[Message]) -> bool:
    """Whether every role may follow the one before it; true where a role is not known and refused already."""
    before = None
    called = False
    follows = True
    for message in messages:
        role = message["role"]
        if not role:
            return True
        if role not in _FOLLOWS[before] and not (before == "assistant" and called and role == "tool"):
            follows = False
        before, called = role, message["tool_calls"]
    return follows


def _judge_prompt(conversation: Conversation, messages: list[Message], contract: ContractConfig) -> None:
    length = 0
    spoken = silent = False
    for message in messages:
        content, calls = message["content"], message["tool_calls"]
        if content is None:
            return
        length += len(content) + len(calls or "")
        if message["role"] != "system":
            if content.strip():
                spoken = True
            elif not calls and message["role"] != "tool":
                silent = True
    if not spoken:
        if contract.min_prompt_chars:
            conversation.refuse(Reason.EMPTY_PROMPT)
    elif silent:
        conversation.refuse(Reason.EMPTY_MESSAGE)
    elif length < contract.min_prompt_chars:
        conversation.refuse(Reason.PROMPT_TOO_SHORT)
    if length > contract.max_prompt_chars:
        conversation.refuse(Reason.PROMPT_TOO_LONG)


def _judge_completion(conversation: Conversation, message: Message, contract: ContractConfig) -> None:
    content, calls = message["content"], message["tool_calls"]
    if content is None:
        return
    length = len(content) + len(calls or "")
    if not content.strip() and not calls:
        conversation.refuse(Reason.EMPTY_COMPLETION)
    elif length < contract.min_completion_chars:
        conversation.refuse(Reason.COMPLETION_TOO_SHORT)
    if length > contract.max_completion_chars:
        conversation.refuse(Reason.COMPLETION_TOO_LONG)


def may_warn(texts: pa.StringArray) -> np.ndarray:
    """Which texts `warnings_of` has a word about: the whole column in one pass, as nearly all have none."""
    return pc.fill_null(pc.match_substring_regex(texts, _EITHER), False).to_numpy(zero_copy_only=False)


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

"""What transformers' AutoTokenizer makes of the tokenizer's own folder.

It may give other ids than tokenizer.json: transformers 5.23 reads SmolLM2's config as a plain GPT-2 tokenizer
and drops the digit splitting that its tokenizer.json declares, so 8 % of ordinary texts get other ids there.
What is exported loads as it was trained.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_pipeline.store import Artifact
from sft_pipeline.text.auto_tokenizer import AutoTokenizerReply, AutoTokenizerRequest, ask_auto_tokenizer
from sft_pipeline.text.conversation import Conversation
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

SKEW_CHECK = "tokenizer_skew"
# Descriptions begin like this where rows were compared; any other outcome proves nothing about later rows.
_COMPARED = "{} rows compared with AutoTokenizer: "
_EARLIER = " (found in an earlier build with the same tokenizer, template and versions)"


@dataclass(frozen=True)
class TokenizerSkew:
    """Whether AutoTokenizer differs from tokenizer.json, how, and both around the first difference."""

    found: bool
    description: str
    example: dict[str, str] = field(default_factory=dict)


def find_skew(tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> TokenizerSkew:
    """Compares each row's ids, and its prompt, with those of AutoTokenizer on the tokenizer's own folder."""
    if not sample:
        return TokenizerSkew(False, "no row to compare AutoTokenizer with")
    (reply,) = ask_auto_tokenizer([skew_request(tokenizer, template, sample)])
    return skew_of(tokenizer, template, sample, reply)


def skew_request(
    tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]
) -> AutoTokenizerRequest:
    texts = [template.render(c.messages, c.tools) for c in sample]
    prompts = [prompt_request(template, template.as_read(c.messages[:-1]), c.tools) for c in sample]
    return AutoTokenizerRequest(str(tokenizer.folder), texts, prompts)


def skew_of(
    tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation], reply: AutoTokenizerReply
) -> TokenizerSkew:
    if reply.unavailable:
        return TokenizerSkew(
            True,
            "AutoTokenizer cannot load this tokenizer, so a server that uses it cannot either: "
            + reply.unavailable,
        )
    ours = [p.ids for p in tokenizer.encode_batch([template.render(c.messages, c.tools) for c in sample])]
    differing = [pair for pair in zip(ours, reply.ids, strict=True) if pair[0] != list(pair[1])]
    other_prompts = sum(
        theirs != template.render(c.messages[:-1], c.tools, add_generation_prompt=True)
        for c, theirs in zip(sample, reply.prompts, strict=True)
    )
    if not differing and not other_prompts:
        return TokenizerSkew(False, _COMPARED.format(len(sample)) + "it gives the same ids and prompts")
    return TokenizerSkew(
        True,
        _COMPARED.format(len(sample)) + f"it gives other ids on {len(differing)} and another prompt on "
        f"{other_prompts} of {len(sample)}; the ids here follow tokenizer.json. Serve with "
        "PreTrainedTokenizerFast, or correct tokenizer_class in tokenizer_config.json",
        _first_difference(tokenizer, *differing[0]) if differing else {},
    )


def known_skew(earlier: Sequence[Artifact]) -> TokenizerSkew | None:
    """What the newest of the earlier builds found, with the same tokenizer, template and versions.

    None where that build compared no rows: it had none, or AutoTokenizer could not be asked.
    """
    for artifact in earlier[:1]:
        for check in artifact.manifest.checks:
            description = str(check["description"])
            if check["name"] == SKEW_CHECK and re.match(_COMPARED.format(r"\d+"), description):
                return TokenizerSkew(not check["passed"], description.removesuffix(_EARLIER) + _EARLIER)
    return None


def prompt_request(
    template: ChatTemplate, messages: Sequence[Any], tools: Sequence[Any] | None
) -> dict[str, Any]:
    """Arguments of `apply_chat_template`."""
    return {
        "conversation": list(messages),
        "tools": list(tools) if tools else None,
        "chat_template": template.tool_text if tools else template.text,
        "add_generation_prompt": True,
    }


def _first_difference(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, str]:
    unequal = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    at = next(unequal, min(len(ours), len(theirs)))
    window = slice(max(at - 3, 0), at + 5)
    return {
        "tokenizer.json": " | ".join(tokenizer.decode([i]) for i in ours[window]),
        "AutoTokenizer": " | ".join(tokenizer.decode([i]) for i in theirs[window]),
    }

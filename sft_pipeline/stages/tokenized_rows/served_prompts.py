"""A sample of the rows, compared with what a server would make of them.

Two comparisons, on the first rows that were not reused: the prompt, rendered and encoded again from the
messages before the final turn, must be what the training row begins with; and transformers' AutoTokenizer
should give the same ids and prompts as tokenizer.json. It may not: transformers 5.23 reads SmolLM2's config
as a plain GPT-2 tokenizer and drops the digit splitting that its tokenizer.json declares, so 8 % of ordinary
texts get other ids in serving than in training.
"""

import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sft_pipeline.stages.tokenized_rows.batch_encoder import BatchEncoder, EncodedBatch
from sft_pipeline.store import Artifact
from sft_pipeline.text.auto_tokenizer import ask_auto_tokenizer
from sft_pipeline.text.conversation import Conversation, conversation
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

SAMPLE = 300
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


class PromptSample:
    """The sampled conversations, and what was found wrong.

    Args:
        known: What an earlier build has found of AutoTokenizer, so that it need not be asked.

    Attributes:
        conversations: Of the sampled rows.
        wrong: Rows that do not begin with the ids of the prompt that a server would send.
    """

    def __init__(self, known: TokenizerSkew | None = None) -> None:
        self._known = known
        self._found: Future[TokenizerSkew] | None = None
        self.conversations: list[Conversation] = []
        self.wrong: list[dict[str, Any]] = []

    def add(self, encoder: BatchEncoder, rows: pa.RecordBatch, encoded: EncodedBatch) -> None:
        """Takes accepted, uncut rows of a batch into the sample until it is full."""
        missing = SAMPLE - len(self.conversations)
        if missing <= 0 or not rows.num_rows:
            return
        examples = encoded.examples.slice(0, 2 * missing).to_pylist()
        by_id = {e["row_id"]: e for e in examples if not e["truncated"]}
        given = [row for row in rows.slice(0, 2 * missing).to_pylist() if row["row_id"] in by_id][:missing]
        reference = encoder.row_encoder
        sampled = [reference.guard.check(conversation(row, reference.system)) for row in given]
        texts = [
            encoder.template.render(c.messages[:-1], c.tools, add_generation_prompt=True) for c in sampled
        ]
        for row, prompt in zip(given, encoder.tokenizer.encode_batch(texts), strict=True):
            example = by_id[row["row_id"]]
            recorded = example["prompt_length"]
            if example["input_ids"][:recorded] != prompt.ids:
                found = {"row_id": row["row_id"], "prompt_tokens": len(prompt.ids), "recorded": recorded}
                self.wrong.append(found)
        self.conversations += sampled
        if len(self.conversations) == SAMPLE and not self._known:
            self._compare(encoder)

    def skew(self, encoder: BatchEncoder) -> TokenizerSkew:
        """How AutoTokenizer differs on the sample; where an earlier build has found that, what it found."""
        return self._known or self._compare(encoder).result()

    def close(self) -> None:
        """Waits for AutoTokenizer's process, where it was asked: it must not outlive a build that failed."""
        if self._found is not None:
            wait([self._found])

    def _compare(self, encoder: BatchEncoder) -> Future[TokenizerSkew]:
        if self._found is None:
            thread = ThreadPoolExecutor(1)  # it mostly waits for a process, two seconds beside the encoding
            arguments = (encoder.tokenizer, encoder.template, tuple(self.conversations))
            self._found = thread.submit(find_skew, *arguments)
            thread.shutdown(wait=False)
        return self._found


def find_skew(tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> TokenizerSkew:
    """Compares each row's ids with AutoTokenizer's, and its prompt unless the template reads the clock."""
    if not sample:
        return TokenizerSkew(False, "no row to compare AutoTokenizer with")
    texts = [template.render(c.messages, c.tools) for c in sample]
    prompts = [
        {
            "conversation": c.messages[:-1],
            "tools": c.tools,
            "chat_template": template.tool_text if c.tools else template.text,
            "add_generation_prompt": True,
        }
        for c in ([] if template.uses_clock else sample)
    ]
    reply = ask_auto_tokenizer(str(tokenizer.folder), texts, prompts)
    if reply.unavailable:
        return TokenizerSkew(
            True,
            "AutoTokenizer cannot load this tokenizer, so a server that uses it cannot either: "
            + reply.unavailable,
        )
    ours = [p.ids for p in tokenizer.encode_batch(texts)]
    differing = [pair for pair in zip(ours, reply.ids, strict=True) if pair[0] != list(pair[1])]
    other_prompts = sum(
        theirs != template.render(c.messages[:-1], c.tools, add_generation_prompt=True)
        for c, theirs in zip(sample, reply.prompts, strict=False)
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


def _first_difference(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, str]:
    unequal = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    at = next(unequal, min(len(ours), len(theirs)))
    window = slice(max(at - 3, 0), at + 5)
    return {
        "tokenizer.json": " | ".join(tokenizer.decode([i]) for i in ours[window]),
        "AutoTokenizer": " | ".join(tokenizer.decode([i]) for i in theirs[window]),
    }

"""Whether transformers' AutoTokenizer, which most servers load, agrees with tokenizer.json on rows of this very data.

It may not: transformers 5.23 reads SmolLM2's config as a plain GPT-2 tokenizer and drops the digit splitting that
its tokenizer.json declares, so 8 % of ordinary texts get other ids in serving than in training.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from sft_pipeline.store import Artifact
from sft_pipeline.text.conversation import Conversation
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer

CHECK = "tokenizer_skew"
_EARLIER = " (found in an earlier build with the same tokenizer, template and versions)"


@dataclass
class Skew:
    """What was compared and what differs.

    Attributes:
        rows: Rows compared.
        other_ids: Rows whose rendered text gets other ids.
        other_prompt: Rows whose prompt is rendered otherwise.
        example: Ours and theirs around the first difference in ids.
        unavailable: Why nothing could be compared.
        earlier: What an earlier build found with the same tokenizer, template and versions: (passed, description).
    """

    rows: int = 0
    other_ids: int = 0
    other_prompt: int = 0
    example: dict[str, str] = field(default_factory=dict)
    unavailable: str | None = None
    earlier: tuple[bool, str] | None = None

    @classmethod
    def of_earlier(cls, builds: Sequence[Artifact]) -> "Skew | None":
        """What the first of these builds, which has the same tokenizer, template and versions, has found."""
        verdicts = [c for a in builds[:1] for c in a.manifest.checks if c["name"] == CHECK]
        return (
            cls(earlier=(bool(verdicts[0]["passed"]), str(verdicts[0]["description"]))) if verdicts else None
        )

    @property
    def found(self) -> bool:
        if self.earlier:
            return not self.earlier[0]
        return bool(self.other_ids or self.other_prompt or self.unavailable)

    def describe(self) -> str:
        if self.earlier:
            return self.earlier[1].removesuffix(_EARLIER) + _EARLIER
        if self.unavailable:
            return f"AutoTokenizer cannot load this tokenizer, so a server that uses it cannot either: {self.unavailable}"
        if not self.found:
            return f"AutoTokenizer gives the same ids and prompts on {self.rows} sampled rows"
        return (
            f"AutoTokenizer gives other ids on {self.other_ids} and another prompt on {self.other_prompt} of {self.rows} sampled rows; the ids here "
            "follow tokenizer.json. Serve with PreTrainedTokenizerFast, or mend tokenizer_class in tokenizer_config.json"
        )


def find_skew(tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> Skew:
    """Compares ids of the rendered text, and the prompt's text, row by row. Imports transformers."""
    served = auto_tokenizer(str(tokenizer.folder), tokenizer.sha256)
    if isinstance(served, str):
        return Skew(unavailable=served)
    texts = [template.render(given.messages, given.tools) for given in sample]
    ours = [p.ids for p in tokenizer.encode_batch(texts)]
    theirs = served(texts, add_special_tokens=False)["input_ids"] if texts else []
    differing = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    other_prompt = 0
    for given in () if template.uses_clock else sample:
        before, source = given.messages[:-1], template.tool_text if given.tools else template.text
        prompt = template.render(before, given.tools, add_generation_prompt=True)
        other_prompt += prompt != served.apply_chat_template(
            before, tools=given.tools, chat_template=source, add_generation_prompt=True, tokenize=False
        )
    example = _first_difference(tokenizer, *differing[0]) if differing else {}
    return Skew(len(sample), len(differing), other_prompt, example)


@lru_cache(maxsize=1)
def auto_tokenizer(folder: str, sha256: str) -> Any:
    """What a server loads, or a text that says why it cannot.

    Args:
        sha256: Of the files, so that changed ones are loaded again.
    """
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises: a server would meet it too
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"


def hide_torch() -> None:
    """Keeps transformers from importing torch in this process, which takes longer than all else and is of no use here."""
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def _first_difference(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, str]:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    window = slice(max(at - 3, 0), at + 5)
    return {
        "tokenizer.json": " | ".join(tokenizer.decode([i]) for i in ours[window]),
        "AutoTokenizer": " | ".join(tokenizer.decode([i]) for i in theirs[window]),
    }

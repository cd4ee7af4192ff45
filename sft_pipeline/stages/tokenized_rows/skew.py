"""Whether transformers' AutoTokenizer, which most servers load, agrees with tokenizer.json on rows of this very data.

It may not: transformers 5.23 reads SmolLM2's config as a plain GPT-2 tokenizer and drops the digit splitting that
its tokenizer.json declares, so 8 % of ordinary texts get other ids in serving than in training.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.conversation import Conversation
from sft_pipeline.stages.tokenized_rows.template import ChatTemplate, load_template
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer, load_tokenizer
from sft_pipeline.stages.workers import Worker
from sft_pipeline.store import Artifact

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


class SkewWatch:
    """Compares in a process of its own, whose imports go on while rows are tokenized here.

    Args:
        earlier: Builds with the same tokenizer, template and versions; what the first of them found holds here too.
    """

    def __init__(self, config: TokenizedRowsConfig, earlier: Sequence[Artifact]) -> None:
        self._config = config
        verdicts = [c for a in earlier[:1] for c in a.manifest.checks if c["name"] == CHECK]
        self._earlier = [(bool(c["passed"]), str(c["description"])) for c in verdicts]
        self._worker: Worker | None = None
        self._sample: list[Conversation] | None = None

    def __enter__(self) -> "SkewWatch":
        if not self._earlier and "transformers" not in sys.modules:
            self._worker = Worker(_without_torch, (self._config,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.end()

    def begin(self, sample: Sequence[Conversation]) -> None:
        """Gives the sample to compare; the first one given counts."""
        if self._sample is None:
            self._sample = list(sample)
            if self._worker:
                self._worker.send(self._sample)

    def find(self) -> Skew:
        """What the comparison finds."""
        if self._earlier:
            return Skew(earlier=self._earlier[0])
        if not self._sample:
            return Skew()
        return self._worker.receive() if self._worker else _finder(self._config)(self._sample)


def _without_torch(config: TokenizedRowsConfig) -> Callable[[Sequence[Conversation]], Skew]:
    """`_finder` in a process where importing torch would take longer than everything else, and is of no use."""
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import transformers  # noqa: F401

    return _finder(config)


def _finder(config: TokenizedRowsConfig) -> Callable[[Sequence[Conversation]], Skew]:
    tokenizer = load_tokenizer(config.tokenizer, config.revision)
    return partial(find_skew, tokenizer, load_template(config.template.chat_template, tokenizer))


def find_skew(tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> Skew:
    """Compares ids of the rendered text, and the prompt's text, row by row. Imports transformers."""
    if not sample:
        return Skew()
    try:
        from transformers import AutoTokenizer

        served: Any = AutoTokenizer.from_pretrained(str(tokenizer.folder), local_files_only=True)
    except Exception as error:  # whatever the library raises: a server would meet it too
        return Skew(
            unavailable=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"
        )
    skew = Skew(rows=len(sample))
    for given in sample:
        text = template.render(given.messages, given.tools)
        ours, theirs = tokenizer.ids(text), served(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            skew.other_ids += 1
            skew.example = skew.example or _first_difference(tokenizer, ours, theirs)
        if not template.uses_clock:
            source = template.tool_text if given.tools else template.text
            prompt = served.apply_chat_template(
                given.messages[:-1], tools=given.tools, chat_template=source, add_generation_prompt=True, tokenize=False
            )  # fmt: skip
            skew.other_prompt += prompt != template.render(
                given.messages[:-1], given.tools, add_generation_prompt=True
            )
    return skew


def _first_difference(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, str]:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    window = slice(max(at - 3, 0), at + 5)
    return {
        "tokenizer.json": " | ".join(tokenizer.decode([i]) for i in ours[window]),
        "AutoTokenizer": " | ".join(tokenizer.decode([i]) for i in theirs[window]),
    }

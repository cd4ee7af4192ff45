"""Whether transformers' AutoTokenizer, which most servers load, agrees with tokenizer.json on rows of this very data.

It may not: transformers 5.23 reads SmolLM2's config as a plain GPT-2 tokenizer and drops the digit splitting that
its tokenizer.json declares, so 8 % of ordinary texts get other ids in serving than in training.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_pipeline.stages.tokenized_rows.conversation import Conversation
from sft_pipeline.stages.tokenized_rows.template import ChatTemplate
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer
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


@dataclass(frozen=True)
class Probe:
    """What a server should make of one row.

    Attributes:
        text: The rendered row.
        ids: Its ids by tokenizer.json.
        asked: What the prompt is rendered from: messages, tools, template. None where that depends on the clock.
        prompt: The rendered prompt.
    """

    text: str
    ids: list[int]
    asked: tuple[list[dict[str, Any]], list[Any] | None, str] | None
    prompt: str


def probes_of(tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> list[Probe]:
    """One probe per conversation."""
    found = []
    for given in sample:
        text, before = template.render(given.messages, given.tools), given.messages[:-1]
        source = template.tool_text if given.tools else template.text
        prompt = template.render(before, given.tools, add_generation_prompt=True)
        asked = None if template.uses_clock else (before, given.tools, source)
        found.append(Probe(text, tokenizer.ids(text), asked, prompt))
    return found


class SkewWatch:
    """Compares in a process of its own, whose imports go on while rows are tokenized here.

    Args:
        earlier: Builds with the same tokenizer, template and versions; what the first of them found holds here too.
    """

    def __init__(self, earlier: Sequence[Artifact]) -> None:
        verdicts = [c for a in earlier[:1] for c in a.manifest.checks if c["name"] == CHECK]
        self._earlier = [(bool(c["passed"]), str(c["description"])) for c in verdicts]
        self._worker: Worker | None = None
        self._probes: list[Probe] | None = None
        self._tokenizer: Tokenizer | None = None

    def __enter__(self) -> "SkewWatch":
        if not self._earlier and "transformers" not in sys.modules:
            self._worker = Worker(_without_torch, ())
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.end()

    def begin(self, tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> None:
        """Gives the sample to compare; the first one given counts."""
        if self._probes is None and not self._earlier:
            self._tokenizer, self._probes = tokenizer, probes_of(tokenizer, template, sample)
            if self._worker:
                self._worker.send((str(tokenizer.folder), self._probes))

    def find(self) -> Skew:
        """What the comparison finds."""
        if self._earlier:
            return Skew(earlier=self._earlier[0])
        if not self._probes or self._tokenizer is None:
            return Skew()
        task = (str(self._tokenizer.folder), self._probes)
        return _judged(self._worker.receive() if self._worker else _served(task), self._tokenizer, self._probes)  # fmt: skip


def find_skew(tokenizer: Tokenizer, template: ChatTemplate, sample: Sequence[Conversation]) -> Skew:
    """Compares ids of the rendered text, and the prompt's text, row by row. Imports transformers."""
    probes = probes_of(tokenizer, template, sample)
    return _judged(_served((str(tokenizer.folder), probes)), tokenizer, probes)


Served = str | list[tuple[list[int] | None, bool]]
"""Why there is no AutoTokenizer; else per probe its ids where they are others, and whether its prompt is another."""


def _without_torch() -> Callable[[tuple[str, list[Probe]]], Served]:
    """`_served` in a process where importing torch would take longer than everything else, and is of no use."""
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoTokenizer  # noqa: F401

    return _served


def _served(task: tuple[str, list[Probe]]) -> Served:
    """What AutoTokenizer makes of the probes, given its folder."""
    folder, probes = task
    try:
        from transformers import AutoTokenizer

        served: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library raises: a server would meet it too
        return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:300]}"
    found: list[tuple[list[int] | None, bool]] = []
    for probe in probes:
        ids, other = served(probe.text, add_special_tokens=False)["input_ids"], False
        if probe.asked:
            messages, tools, source = probe.asked
            prompt = served.apply_chat_template(
                messages, tools=tools, chat_template=source, add_generation_prompt=True, tokenize=False
            )
            other = prompt != probe.prompt
        found.append((None if ids == probe.ids else ids, other))
    return found


def _judged(served: Served, tokenizer: Tokenizer, probes: Sequence[Probe]) -> Skew:
    if isinstance(served, str):
        return Skew(unavailable=served)
    differing = [(p.ids, theirs) for p, (theirs, _) in zip(probes, served, strict=True) if theirs is not None]
    return Skew(
        rows=len(probes),
        other_ids=len(differing),
        other_prompt=sum(other for _, other in served),
        example=_first_difference(tokenizer, *differing[0]) if differing else {},
    )


def _first_difference(tokenizer: Tokenizer, ours: Sequence[int], theirs: Sequence[int]) -> dict[str, str]:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    window = slice(max(at - 3, 0), at + 5)
    return {
        "tokenizer.json": " | ".join(tokenizer.decode([i]) for i in ours[window]),
        "AutoTokenizer": " | ".join(tokenizer.decode([i]) for i in theirs[window]),
    }

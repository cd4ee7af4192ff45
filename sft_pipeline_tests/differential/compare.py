"""One source row through the pipeline's own functions, and beside it through transformers alone."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_encoder import AcceptedRow, Example, RejectedRow, RowEncoder
from sft_pipeline.stages.validated_rows.config import ContractConfig, SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.validate import RowValidator
from sft_pipeline.text.auto_tokenizer import frozen_clock
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.tokenizer import load_tokenizer, make_tokenizer
from sft_pipeline_tests.differential.space import Pairing, backend_for, templates

WHITE_SPACE = "white space after the stop"


@dataclass(frozen=True)
class Compared:
    """What became of a row: "equal", "refused: why", or "different: how"."""

    outcome: str
    detail: str = ""


class Comparison:
    """A template with a tokenizer that fits it, on both sides.

    Raises:
        InputError: The tokenizer has no such template.
    """

    def __init__(self, pairing: Pairing, supervise: str) -> None:
        if pairing.tokenizer is None:
            source = templates()[pairing.template]
            backend, special = backend_for(source)
            own, _ = backend_for(source)
            tokenizer = make_tokenizer(own, special=special, templates={"default": source})
            self.template = load_template("tokenizer", tokenizer)
            self.served: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        else:
            tokenizer = load_tokenizer(str(pairing.tokenizer))
            if pairing.template in templates():
                tokenizer = replace(tokenizer, templates={"default": templates()[pairing.template]})
            named = "tokenizer" if pairing.template in templates() else pairing.template
            self.template = load_template(named, tokenizer)
            # Exactly its tokenizer.json. AutoTokenizer rebuilds some otherwise, from the class that their
            # configuration names, which the check `tokenizer_skew` is about.
            self.served = PreTrainedTokenizerFast.from_pretrained(str(pairing.tokenizer))
        self.supervise = supervise
        tokens = TokensConfig(max_length=100_000, supervise=supervise)
        self.encoder = RowEncoder(tokenizer, self.template, tokens)
        self.served.chat_template = self.template.text
        config = ValidatedRowsConfig(
            contract=ContractConfig(), shapes=[SourceShape(format="messages", columns={})]
        )
        self.validator = RowValidator(config, [None])

    def compare(self, rows: Sequence[Mapping[str, Any]]) -> list[Compared]:
        """Each row as it is trained, and as transformers renders its source."""
        found = []
        for row, trained in zip(rows, self._train(rows), strict=True):
            if isinstance(trained, AcceptedRow):
                found.append(self._compare(dict(row), trained))
            else:
                found.append(trained)
        return found

    def examples(self, rows: Sequence[Mapping[str, Any]]) -> list[Example | str]:
        """What each row is trained as, or why it is refused."""
        return [
            found.outcome.removeprefix("refused: ") if isinstance(found, Compared) else found.examples[0]
            for found in self._train(rows)
        ]

    def _train(self, rows: Sequence[Mapping[str, Any]]) -> list[AcceptedRow | Compared]:
        contents = [json.dumps(row, ensure_ascii=False) for row in rows]
        batch = pa.RecordBatch.from_pydict(
            {
                "row_id": [f"{i:032x}" for i in range(len(rows))],
                "source": pa.array([0] * len(rows), pa.int32()),
                "file": ["rows.jsonl"] * len(rows),
                "line": list(range(len(rows))),
                "content": contents,
            }
        )
        validated = self.validator(batch)
        places = {int(i): at for at, i in enumerate(validated.kept)}
        refused = dict(zip(validated.rejected.tolist(), validated.reasons, strict=True))
        normalized = validated.rows.to_pylist()
        results = self.encoder.encode([{**row, "row_id": str(i)} for i, row in enumerate(normalized)])
        found: list[AcceptedRow | Compared] = []
        for i in range(len(rows)):
            if i in refused:
                found.append(Compared("refused: " + ", ".join(refused[i])))
                continue
            result = results[places[i]]
            refusal = (
                Compared(f"refused: {result.reason}", result.detail)
                if isinstance(result, RejectedRow)
                else None
            )
            found.append(refusal or result)
        return found

    def _render(self, messages: list[Any], tools: Any, *, prompt: bool) -> str:
        with frozen_clock():
            return str(
                self.served.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False
                )
            )

    def _compare(self, source: dict[str, Any], result: AcceptedRow) -> Compared:
        messages, tools = [self._as_sent(m) for m in source["messages"]], source.get("tools")
        (example,) = result.examples
        ids, labels = example.input_ids.tolist(), example.labels.tolist()
        try:
            prompt = self._render(messages[:-1], tools, prompt=True)
            whole = self._render(messages, tools, prompt=False)
        except Exception as error:
            return Compared("different: transformers refuses it", str(error))
        expected = self.served(prompt, add_special_tokens=False)["input_ids"]
        if ids[: example.prompt_length] != expected:
            return Compared(
                "different: the prompt", self._decode(ids[: example.prompt_length]) + "\n---\n" + prompt
            )
        if not whole.startswith(prompt):
            return Compared("different: accepted though the row does not begin with its prompt", whole)
        spans = spans_of(labels)
        if spans[-1][0] != len(expected):
            return Compared("different: the final turn does not begin behind the prompt", repr(spans))
        for begin, end in spans:
            if problem := self._check_turn(messages, tools, whole, ids, begin, end):
                return Compared(f"different: {problem}", self._decode(ids[begin:end]))
        return Compared("equal")

    def _check_turn(
        self, messages: list[Any], tools: Any, whole: str, ids: list[int], begin: int, end: int
    ) -> str | None:
        """A supervised span must be what an assistant message adds to the prompt that a server sends."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], tools, prompt=True)
            if self.served(prompt, add_special_tokens=False)["input_ids"] != ids[:begin]:
                continue
            # Decoders drop the space before the first word, or put one there: one of the two ways is right.
            alone, within = self._decode(ids[begin:end]), self._decode(ids[:end])
            turns = (alone, within[len(self._decode(ids[:begin])) :])
            turn = next((t for t in turns if whole.startswith(prompt + t)), None)
            if turn is None:
                return "the span is not what follows its prompt"
            if index + 1 < len(messages):
                bound = len(self._render(messages[: index + 1], tools, prompt=False))
                if len((prompt + turn).rstrip()) > bound:
                    return "the span leaves its message"
            elif visible(whole[len(prompt + turn) :], self.served.all_special_tokens):
                return "the span ends before the final turn does"
            said = [message["content"]]
            said += [message.get(self.template.reasoning_field) or ""]
            said += [call["function"]["name"] for call in message.get("tool_calls") or ()]
            missing = [text for text in said if squeezed(text) not in squeezed(turn)]
            return f"the span lacks {missing[0]!r}" if missing else None
        return "no assistant message has this prompt"

    def problem_of_span(self, row: Mapping[str, Any], ids: list[int], begin: int, end: int) -> str | None:
        """Why a supervised span is not what the template writes after a prompt that a server sends, up to and
        with what ends the turn; None where it is.
        """
        messages, tools, stop = (
            [self._as_sent(m) for m in row["messages"]],
            row.get("tools"),
            self.template.stop,
        )
        try:
            whole = self._render(messages, tools, prompt=False)
            prompts = [
                self._render(messages[:index], tools, prompt=True)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except Exception:
            return "the served template refuses the row"
        fitting = [p for p in prompts if self.served(p, add_special_tokens=False)["input_ids"] == ids[:begin]]
        if not fitting:
            return "no server sends the prompt before it"
        alone, within = self._decode(ids[begin:end]), self._decode(ids[:end])
        rest = whole[len(fitting[0]) :] if whole.startswith(fitting[0]) else None
        if rest is None:
            return "the row does not begin with its prompt"
        turn = next(
            (t for t in (alone, within[len(self._decode(ids[:begin])) :]) if rest.startswith(t)), None
        )
        if turn is None:
            return "it is not what follows the prompt"
        if stop is None or turn.endswith(stop):
            return None
        if stop in turn:
            return WHITE_SPACE if turn.rstrip().endswith(stop) else "it goes on into the next turn"
        return "the stop is missing" if rest[len(turn) :].lstrip().startswith(stop) else None

    def _decode(self, ids: list[int]) -> str:
        return str(self.served.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _as_sent(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as a client of a text-only server sends it, with reasoning under the template's name."""
        sent = dict(message)
        if isinstance(sent["content"], list):
            sent["content"] = "".join(part["text"] for part in sent["content"])
        if "reasoning_content" in sent:
            sent[self.template.reasoning_field] = sent.pop("reasoning_content")
        return sent


def spans_of(labels: Sequence[int]) -> list[tuple[int, int]]:
    on = [label != -100 for label in labels]
    edges = [i for i in range(len(on) + 1) if (i < len(on) and on[i]) != (i > 0 and on[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def squeezed(text: str) -> str:
    return "".join(text.split())


def visible(text: str, control: Sequence[str]) -> str:
    """What is left of a text without control tokens and white space."""
    return re.sub("|".join(map(re.escape, control)) or r"(?!)", "", text).strip()

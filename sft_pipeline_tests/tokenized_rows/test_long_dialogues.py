"""Long conversations: most prompts are not rendered, and nothing about the tokens changes."""

import random
from typing import Any

import pytest

from sft_pipeline.stages.tokenized_rows import rendering
from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_encoder import AcceptedRow, RowEncoder
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.tokenizer import make_tokenizer
from sft_pipeline_tests.differential.space import backend_for, templates

TEMPLATES = [
    "qwen3",
    "qwen2_5",
    "llama3_1",
    "phi3",
    "cohere2",
    "gemma3",
    "deepseekv3",
    "gptoss",
    "glm4moe",
    "lfm2",
]


def encoder(name: str, **tokens: Any) -> RowEncoder:
    source = templates()[name]
    backend, special = backend_for(source)
    tokenizer = make_tokenizer(backend, special=special, templates={"default": source})
    config = TokensConfig(**{"max_length": 100_000, "supervise": "assistant", **tokens})
    return RowEncoder(tokenizer, load_template("tokenizer", tokenizer), config)


def dialogue(seed: int, turns: int) -> dict[str, Any]:
    chance = random.Random(seed)
    messages = []
    for i in range(turns):
        content = chance.choice(["yes", "assistant", " edge", "a\nb", "two words", f"number {i}"])
        message = {"role": ("user", "assistant")[i % 2], "content": content}
        if i % 2 and chance.random() < 0.1:
            message["reasoning_content"] = "Hm."
        if i % 2 and chance.random() < 0.05:
            message["content"] = "<think>\nHm.\n</think>\n\nyes"
        messages.append(message)
    return {"row_id": f"{seed:032x}", "group": "g", "messages": messages, "tools": None}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_tokens_as_with_every_prompt_rendered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [dialogue(seed, 80 + 2 * seed) for seed in range(4)]
    found = encoder(name).encode(rows)
    monkeypatch.setattr(rendering, "MANY_TURNS", 10_000)
    expected = encoder(name).encode(rows)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        if isinstance(a, AcceptedRow) and isinstance(b, AcceptedRow):
            assert a.turns_not_supervised == b.turns_not_supervised
            assert a.examples[0].labels.tolist() == b.examples[0].labels.tolist()


def test_few_prompts_of_a_long_conversation_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    one = encoder("qwen2_5")
    render = rendering._prompt
    monkeypatch.setattr(rendering, "_prompt", lambda *a: calls.append(1) or render(*a))
    row = dialogue(0, 400)
    for message in row["messages"]:
        message.pop("reasoning_content", None)
        message["content"] = "yes"
    (result,) = one.encode([row])
    assert isinstance(result, AcceptedRow) and result.turns_not_supervised == 0
    assert len(calls) < 40


def test_every_supervised_token_of_a_long_conversation_is_in_one_window() -> None:
    row = dialogue(1, 60)
    (whole,) = encoder("qwen2_5").encode([row])
    (split,) = encoder("qwen2_5", max_length=64, overflow="split").encode([row])
    assert isinstance(whole, AcceptedRow) and isinstance(split, AcceptedRow)
    (one,) = whole.examples
    expected = one.labels[one.labels != IGNORE_LABEL].tolist()
    assert len(split.examples) > 3 and all(len(e.input_ids) <= 64 for e in split.examples)
    assert [i for e in split.examples for i in e.labels[e.labels != IGNORE_LABEL].tolist()] == expected

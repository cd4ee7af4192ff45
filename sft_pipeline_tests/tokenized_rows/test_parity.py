"""Rendering and ids equal those of transformers, on real tokenizers and their own templates."""

import json
from functools import lru_cache
from pathlib import Path

import pytest

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_encoder import RejectedRow, RowEncoder
from sft_pipeline.stages.tokenized_rows.tokenizer_skew import find_skew
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.config import NAMED_TEMPLATES
from sft_pipeline.text.conversation import conversation
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.reasons import Reason
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import row

pytestmark = pytest.mark.shared_data

OWN = ["qwen3", "smollm2", "phi-3-mini", "minimind-6400", "olmo2-dolma2"]
WITHOUT = ["gpt2", "../models/stories260K"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look <it> & up: é",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
CALLS = [{"type": "function", "function": {"name": "look_up", "arguments": {"what": "ключ", "n": 3}}}]
ROWS = [
    row(("user", "Who may read it?"), ("assistant", "The owner.")),
    row(
        ("system", "Be brief."),
        ("user", "1234 + 5678?"),
        ("assistant", "6912"),
        ("user", "And 10x that?"),
        ("assistant", "69120"),
    ),
    row(("user", "  Leading and trailing  "), ("assistant", "\n\n  indented\n\tcode\n")),
    row(("user", "emoji 😀 and 漢字"), ("assistant", "naïve café — ½ 👩‍👩‍👧")),
    row(("user", "a\r\nb\n\n\nc"), ("assistant", "x" * 300)),
    row(
        ("user", "Think"),
        ("assistant", "<think>\nhm\n</think>\n\nDone."),
        ("user", "Again"),
        ("assistant", "Done again."),
    ),
]
TOOL_ROWS = [
    row(("user", "Look"), ("assistant", "It is there."), tools=TOOLS),
    row(("user", "Look"), ("assistant", "Let me see."), tools=TOOLS, calls=CALLS),
]


@pytest.fixture(scope="module")
def load(shared_data: Path):
    return lru_cache(lambda name: load_tokenizer(str(shared_data / "tokenizers" / name)))


def served(tokenizer: Tokenizer):
    """The same tokenizer.json, loaded by transformers (AutoTokenizer drops part of SmolLM2's)."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(tokenizer.folder))


@pytest.mark.parametrize("name", OWN)
def test_prompt_ids_equal_apply_chat_template_and_rows_decode(load, name):
    tokenizer = load(name)
    other, template = served(tokenizer), load_template("tokenizer", tokenizer)
    e = RowEncoder(tokenizer, template, TokensConfig(max_length=4096))
    rows = ROWS + (TOOL_ROWS if name in ("qwen3", "minimind-6400") else [])
    for given, outcome in zip(rows, e.encode(rows), strict=True):
        plain = conversation(given)
        text = template.render(plain.messages, plain.tools)
        assert text == other.apply_chat_template(plain.messages, tools=plain.tools, tokenize=False)
        prompt = other.apply_chat_template(
            plain.messages[:-1], tools=plain.tools, add_generation_prompt=True, return_dict=False
        )
        assert not isinstance(outcome, RejectedRow), (given["messages"], outcome)
        (x,) = outcome.examples
        assert x.input_ids[: x.prompt_length].tolist() == prompt
        supervised = tokenizer.decode(x.labels[x.labels != IGNORE_LABEL].tolist())
        assert (
            supervised.endswith(template.stop or "") and (x.labels[: x.prompt_length] == IGNORE_LABEL).all()
        )
        assert "".join(plain.completion.split()) in "".join(supervised.split())
        joined = other(text, add_special_tokens=False)["input_ids"]
        if joined[: len(prompt)] == prompt and not plain.completion[:1].isspace():
            assert x.input_ids.tolist() == joined


@pytest.mark.parametrize("name", OWN + WITHOUT)
@pytest.mark.parametrize("template", NAMED_TEMPLATES)
@pytest.mark.parametrize("supervise", ["completion", "assistant"])
def test_named_templates_never_add_tokens_and_end_turns_with_the_tokenizers_eos(
    load, name, template, supervise
):
    tokenizer = load(name)
    named = load_template(template, tokenizer)
    assert named.stop == tokenizer.special["eos_token"]
    e = RowEncoder(tokenizer, named, TokensConfig(max_length=4096, supervise=supervise))
    for given, outcome in zip(ROWS, e.encode(ROWS), strict=True):
        assert not isinstance(outcome, RejectedRow), (given["messages"], outcome)
        (x,) = outcome.examples
        supervised = x.labels[x.labels != IGNORE_LABEL]
        assert supervised[-1] == tokenizer.id_of("eos_token") and x.input_ids.max() < tokenizer.vocab_size
        assert (x.input_ids[:1].tolist() == [tokenizer.id_of("bos_token")]) or not tokenizer.adds_bos
        prompt = named.render(conversation(given).messages[:-1], add_generation_prompt=True)
        assert x.input_ids[: x.prompt_length].tolist() == tokenizer.ids(prompt)


def test_an_empty_thinking_block_is_reported_and_shortened_turns_are_counted(load):
    tokenizer = load("qwen3")
    e = RowEncoder(
        tokenizer, load_template("tokenizer", tokenizer), TokensConfig(max_length=4096, supervise="assistant")
    )
    plain, thinking = e.encode([ROWS[1], ROWS[5]])
    assert plain.inserted == ("<think>\n\n</think>\n\n", "") and plain.turns_not_supervised == 0
    assert thinking.turns_not_supervised == 1


def test_a_row_with_thinking_is_rejected_where_the_prompt_already_opens_a_thinking_block(load):
    tokenizer = load("minimind-6400")
    e = RowEncoder(tokenizer, load_template("tokenizer", tokenizer), TokensConfig(max_length=4096))
    (refused,) = e.encode([row(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"))])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.PROMPT_NOT_PREFIX


def test_skew_of_smollm2_is_found_and_qwen3_has_none(load):
    texts = [
        conversation(row(("user", f"line {i}:\n   {i * 37} and\t{i}"), ("assistant", f"  {i * 1009}")))
        for i in range(40)
    ]
    smollm = load("smollm2")
    skew = find_skew(smollm, load_template("tokenizer", smollm), texts)
    assert skew.found and skew.description.startswith("40 rows compared with AutoTokenizer: it gives other")
    assert "another prompt on 0 of 40" in skew.description and "tokenizer.json" in skew.example
    qwen = load("qwen3")
    assert not find_skew(qwen, load_template("tokenizer", qwen), texts).found


def test_encoding_prompt_and_answer_apart_keeps_the_ids_of_gsm8k(load, shared_data):
    tokenizer = load("qwen3")
    e = RowEncoder(tokenizer, load_template("tokenizer", tokenizer), TokensConfig(max_length=4096))
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]
    rows = [row(("user", r["question"]), ("assistant", r["answer"])) for r in map(json.loads, lines)]
    for given, outcome in zip(rows, e.encode(rows), strict=True):
        assert outcome.examples[0].input_ids.tolist() == tokenizer.ids(
            e.template.render(conversation(given).messages)
        )

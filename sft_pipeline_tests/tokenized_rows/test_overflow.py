"""Rows longer than max_length: rejected, shortened or split, and counted."""

import numpy as np
import pytest

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_encoder import RejectedRow, RowEncoder
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.reasons import Reason
from sft_pipeline_tests.text.tiny import tiny_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import row

LONG_ANSWER = row(("user", "who may read"), ("assistant", " ".join(f"part{i}" for i in range(40))))
LONG_PROMPT = row(("user", " ".join(f"word{i}" for i in range(40))), ("assistant", "the user"))


def encoder(max_length: int, overflow: str, **tokens) -> RowEncoder:
    tokenizer = tiny_tokenizer()
    return RowEncoder(
        tokenizer,
        load_template("tokenizer", tokenizer),
        TokensConfig(max_length=max_length, overflow=overflow, **tokens),
    )


def whole(given: dict, **tokens):
    (x,) = encoder(4096, "reject", **tokens).encode([given])[0].examples
    return x


@pytest.mark.parametrize("policy", ["reject", "split", "truncate_answer"])
def test_a_prompt_that_fills_max_length_is_rejected(policy):
    full = whole(LONG_PROMPT)
    for limit in (full.prompt_length, full.prompt_length - 3):
        e = encoder(limit, policy)
        (refused,) = e.encode([LONG_PROMPT])
        assert isinstance(refused, RejectedRow) and refused.reason is Reason.NO_ROOM_FOR_COMPLETION


def test_reject_keeps_a_row_that_just_fits_and_rejects_one_token_more():
    full = whole(LONG_ANSWER)
    (x,) = encoder(len(full.input_ids), "reject").encode([LONG_ANSWER])[0].examples
    assert x.truncated == 0
    # One token less: only the newline after the stop token is lost.
    (x,) = encoder(len(full.input_ids) - 1, "reject").encode([LONG_ANSWER])[0].examples
    assert x.truncated == 0 and (x.labels != IGNORE_LABEL).sum() == (full.labels != IGNORE_LABEL).sum()
    (refused,) = encoder(len(full.input_ids) - 2, "reject").encode([LONG_ANSWER])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.TOO_LONG


def test_truncate_answer_cuts_the_end_with_its_stop_token_and_counts_the_tokens():
    full = whole(LONG_ANSWER)
    e = encoder(40, "truncate_answer")
    (x,) = e.encode([LONG_ANSWER])[0].examples
    assert (
        x.input_ids.tolist() == full.input_ids[:40].tolist()
        and x.labels.tolist() == full.labels[:40].tolist()
    )
    assert x.truncated == len(full.input_ids) - 40


def test_truncate_answer_rejects_a_row_of_which_only_the_templates_own_text_behind_it_is_supervised():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template += "{% if not add_generation_prompt %}<|im_end|> the end{% endif %}"
    tokenizer = tiny_tokenizer(template)
    tokens = TokensConfig(max_length=30, overflow="truncate_answer", supervise="all")
    e = RowEncoder(tokenizer, load_template("tokenizer", tokenizer), tokens)
    (refused,) = e.encode([row(("user", "who"), ("assistant", "part " * 40), weights=[0, 0])])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.NO_ROOM_FOR_COMPLETION


def test_a_final_prompt_that_fills_max_length_is_rejected_though_earlier_turns_fit():
    turns = (("user", "who"), ("assistant", "the user"), ("user", "part " * 40), ("assistant", "no"))
    given = row(*turns)
    (whole,) = encoder(400, "reject", supervise="assistant").encode([given])
    (split,) = encoder(60, "split", supervise="assistant").encode([given])
    supervised = [sum((e.labels != -100).sum() for e in r.examples) for r in (whole, split)]
    assert len(split.examples) > 1 and supervised[0] == supervised[1] > 0
    (refused,) = encoder(60, "truncate_answer", supervise="assistant").encode([given])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.NO_ROOM_FOR_COMPLETION


def test_truncate_prompt_gives_the_served_prompt_of_a_shorter_conversation():
    e = encoder(60, "truncate_prompt")
    (x,) = e.encode([LONG_PROMPT])[0].examples
    text = e.tokenizer.decode(x.input_ids.tolist())
    question = text.removeprefix("<|im_start|>user\n").split("<|im_end|>")[0]
    whole_question = LONG_PROMPT["messages"][0]["content"]
    assert 0 < len(question) < len(whole_question) and whole_question.endswith(question)
    prompt = e.tokenizer.ids(
        e.template.render([{"role": "user", "content": question}], add_generation_prompt=True)
    )
    assert x.input_ids[: x.prompt_length].tolist() == prompt
    assert len(x.input_ids) <= 60 and x.truncated > 0
    assert "the user<|im_end|>" in text


def test_truncate_prompt_drops_the_oldest_turns_first_and_keeps_the_system_message():
    turns = [m for i in range(12) for m in (("user", f"question {i}"), ("assistant", f"answer {i}"))]
    given = row(("system", "be brief"), *turns)
    e = encoder(90, "truncate_prompt")
    (x,) = e.encode([given])[0].examples
    text = e.tokenizer.decode(x.input_ids.tolist())
    assert (
        "be brief" in text
        and "question 0" not in text
        and "answer 11<|im_end|>" in text
        and len(x.input_ids) <= 90
    )


def test_truncate_prompt_rejects_an_answer_that_does_not_fit_by_itself():
    (refused,) = encoder(40, "truncate_prompt").encode([LONG_ANSWER])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.NO_ROOM_FOR_COMPLETION


@pytest.mark.parametrize("limit", [40, 64, 100])
def test_split_supervises_every_token_in_one_part(limit):
    full = whole(LONG_ANSWER)
    e = encoder(limit, "split")
    parts = e.encode([LONG_ANSWER])[0].examples
    assert [p.row_id for p in parts] == ["r", *(f"r/{i}" for i in range(1, len(parts)))]
    assert all(
        len(p.input_ids) <= limit and (p.labels != IGNORE_LABEL).any() and p.labels[0] == IGNORE_LABEL
        for p in parts
    )
    supervised = np.concatenate([p.labels[p.labels != IGNORE_LABEL] for p in parts])
    assert supervised.tolist() == full.labels[full.labels != IGNORE_LABEL].tolist()
    assert (
        parts[0].input_ids[: parts[0].prompt_length].tolist() == full.input_ids[: full.prompt_length].tolist()
    )
    for p in parts:  # each part is a stretch of the row
        assert any(
            full.input_ids[i : i + len(p.input_ids)].tolist() == p.input_ids.tolist()
            for i in range(len(full.input_ids))
        )

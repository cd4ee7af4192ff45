"""Which tokens carry loss: exact ids, every mode, and properties over generated conversations."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_encoder import Example, RejectedRow, RowEncoder
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.reasons import Reason
from sft_pipeline_tests.text.tiny import CHATML, MARKED, SHORT, tiny_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import row


def encoder(template: str = CHATML, name: str = "tokenizer", **tokens) -> RowEncoder:
    tokenizer = tiny_tokenizer(template)
    return RowEncoder(
        tokenizer, load_template(name, tokenizer), TokensConfig(**{"max_length": 4096, **tokens})
    )


def example(e: RowEncoder, given_row: dict) -> Example:
    outcome = e.encode([given_row])[0]
    assert not isinstance(outcome, RejectedRow), (outcome.reason, outcome.detail)
    (x,) = outcome.examples
    return x


def supervised_texts(e: RowEncoder, x: Example) -> list[str]:
    """The text of each supervised stretch."""
    out, current = [], []
    for token, label in zip(x.input_ids.tolist(), x.labels.tolist(), strict=True):
        if label != IGNORE_LABEL:
            current.append(token)
        elif current:
            out, current = [*out, e.tokenizer.decode(current)], []
    return [*out, e.tokenizer.decode(current)] if current else out


def test_five_prompt_tokens_are_masked_and_answer_and_stop_token_are_supervised():
    e = encoder(SHORT)
    x = example(e, row(("user", "xyz"), ("assistant", "q")))
    start, end = e.tokenizer.control["<|im_start|>"], e.tokenizer.control["<|im_end|>"]
    letters = [e.tokenizer.ids(c)[0] for c in "xyzq"]
    assert x.input_ids.tolist() == [start, *letters[:3], end, letters[3], end]
    assert x.labels.tolist() == [IGNORE_LABEL] * 5 + [letters[3], end]


def test_golden_ids_of_a_chat_row():
    e = encoder()
    x = example(e, row(("user", "who may read the report"), ("assistant", "the user")))
    assert x.input_ids.tolist() == GOLDEN_IDS
    assert x.labels.tolist() == [IGNORE_LABEL] * x.prompt_length + GOLDEN_IDS[x.prompt_length : -1] + [
        IGNORE_LABEL
    ]
    assert (
        e.tokenizer.decode(GOLDEN_IDS)
        == "<|im_start|>user\nwho may read the report<|im_end|>\n<|im_start|>assistant\nthe user<|im_end|>\n"
    )


GOLDEN_IDS = [331, 268, 198, 301, 308, 315, 262, 328, 332, 198, 331, 277, 322, 198, 258, 304, 332, 198]

MULTI = (
    ("system", "be brief"),
    ("user", "one?"),
    ("assistant", "first"),
    ("user", "two?"),
    ("assistant", "second"),
    ("tool", "result"),
    ("assistant", "third"),
)


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [
        ("completion", ["third<|im_end|>"]),
        ("last_turn", ["second<|im_end|>", "third<|im_end|>"]),
        ("assistant", ["first<|im_end|>", "second<|im_end|>", "third<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_each_mode_supervises_its_turns(supervise, expected, template):
    e = encoder(template, supervise=supervise)
    assert supervised_texts(e, example(e, row(*MULTI))) == expected
    assert e.encode([row(*MULTI)])[0].marks_agree is (None if template == CHATML else True)


def test_all_supervises_everything_but_the_first_position_and_weight_0_messages():
    e = encoder(supervise="all")
    x = example(e, row(*MULTI))
    assert (x.labels[1:] == x.input_ids[1:]).all() and x.labels[0] == IGNORE_LABEL
    weightless = supervised_texts(e, example(e, row(*MULTI, weights=[None, 0.0, 0.0])))
    assert not any("one?" in t or "first" in t for t in weightless) and any("second" in t for t in weightless)


def test_weight_0_takes_a_turn_out_and_a_row_without_any_is_rejected():
    e = encoder(supervise="assistant")
    assert supervised_texts(e, example(e, row(*MULTI, weights=[None, None, 0.0]))) == [
        "second<|im_end|>",
        "third<|im_end|>",
    ]
    (refused,) = encoder().encode([row(*MULTI, weights=[None] * 6 + [0.0])])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.NOTHING_SUPERVISED


def test_no_token_forms_across_the_end_of_the_prompt():
    """The prompt ends with a newline and the answer begins with one; a server encodes the prompt alone."""
    tokenizer = tiny_tokenizer()
    e = encoder()
    x = example(e, row(("user", "who"), ("assistant", "\n\nthe user")))
    prompt = tokenizer.ids("<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n")
    assert x.input_ids[: x.prompt_length].tolist() == prompt
    assert supervised_texts(e, x) == ["\n\nthe user<|im_end|>"]


THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n'"
    " + ('<think>\n\n</think>\n\n' if loop.last and '</think>' not in m.content else '')"
    " + (m.content if loop.last else m.content.split('</think>')[-1].lstrip()) + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_earlier_turns_that_the_template_shortens_are_not_supervised():
    e = encoder(THINKING, supervise="assistant")
    (outcome,) = e.encode(
        [
            row(
                ("user", "a"),
                ("assistant", "<think>hm</think>\n\nfirst"),
                ("user", "b"),
                ("assistant", "second"),
            )
        ]
    )
    (x,) = outcome.examples
    assert supervised_texts(e, x) == ["<think>\n\n</think>\n\nsecond<|im_end|>"]
    assert outcome.turns_not_supervised == 1
    assert outcome.inserted == ("<think>\n\n</think>\n\n", "")


def test_a_row_that_does_not_begin_with_its_prompt_is_rejected():
    different = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\nSure: ' }}")
    (refused,) = encoder(different).encode([row(("user", "a"), ("assistant", "b"))])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.PROMPT_NOT_PREFIX


def test_a_row_whose_completion_the_template_drops_is_rejected():
    (refused,) = encoder(CHATML.replace("m.content", "m.content[:3]")).encode(
        [row(("user", "ab"), ("assistant", "abcdef"))]
    )
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.COMPLETION_NOT_RENDERED


def test_the_last_message_must_be_the_assistants():
    (refused,) = encoder().encode([row(("user", "a"))])
    assert isinstance(refused, RejectedRow) and refused.reason is Reason.NO_FINAL_ASSISTANT


words = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufdd0\ufdd1\ufdd2"),
    min_size=1,
    max_size=24,
).filter(str.strip)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    turns=turns,
    system=st.none() | words,
    name=st.sampled_from(["tokenizer", "chatml", "llama3", "qwen", "mistral", "alpaca", "plain"]),
    supervise=st.sampled_from(["completion", "assistant", "last_turn"]),
    template=st.sampled_from([CHATML, MARKED, THINKING]),
)
def test_no_label_is_on_a_prompt_token_and_decoding_gives_completion_and_stop(
    turns, system, name, supervise, template
):
    e = encoder(template, name, supervise=supervise)
    messages = ([("system", system)] if system else []) + [
        m for q, a in turns for m in (("user", q), ("assistant", a))
    ]
    given_row = row(*messages)
    outcome = e.encode([given_row])[0]
    if isinstance(outcome, RejectedRow):
        assert outcome.reason in (Reason.COMPLETION_NOT_RENDERED, Reason.CONTROL_TOKEN_IN_TEXT), (
            outcome.reason,
            outcome.detail,
        )
        return
    (x,) = outcome.examples
    plain = [{"role": r, "content": c} for r, c in messages]
    prompt = e.tokenizer.ids(e.template.render(plain[:-1], add_generation_prompt=True))
    assert x.input_ids[: len(prompt)].tolist() == prompt and x.prompt_length == len(prompt)
    supervised = x.labels != IGNORE_LABEL
    assert (x.labels[supervised] == x.input_ids[supervised]).all() and not supervised[0]
    if supervise == "completion":
        assert not supervised[: len(prompt)].any()
    last = supervised_texts(e, x)[-1]
    assert last.endswith(e.template.stop or "") and turns[-1][1].strip() in last
    assert e.template.render(plain).startswith(e.tokenizer.decode(prompt) + last)
    assert all(any(a.strip() in text for _, a in turns) for text in supervised_texts(e, x))

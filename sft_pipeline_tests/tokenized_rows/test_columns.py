"""Whole columns against row by row: equal examples for every row that is encoded as a column."""

import json
from collections.abc import Iterator

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.stages.tokenized_rows import word_cache
from sft_pipeline.stages.tokenized_rows.column_encoder import ColumnEncoder
from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.outcomes import outcome_of
from sft_pipeline.stages.tokenized_rows.row_encoder import AcceptedRow, RowEncoder, to_batch
from sft_pipeline.stages.tokenized_rows.row_layout import find_layout
from sft_pipeline.tables.schemas import ROWS
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.tokenizer import load_tokenizer
from sft_pipeline_tests.text.tiny import CHATML, MARKED, tiny_tokenizer
from sft_pipeline_tests.tokenized_rows.rows import row

_END = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_TURN = "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"
BRANCHING = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if c.startswith('the') and loop.last %}{% set c = c + ' (the)' %}{% endif %}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _END
)
THINKING = (
    "{% macro body(text) %}{{ text }}{% endmacro %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ body(m.content) }}{{ '<|im_end|>\n' }}{% endfor %}" + _END
)
TRIMMING = "{% for m in messages %}{% set c = m.content | trim %}" + _TURN + "{% endfor %}" + _END
CAPTURING = (
    "{% for m in messages %}{% set c %}{{ m.content }}{% endset %}"
    "{% if c %}" + _TURN + "{% endif %}{% endfor %}" + _END
)
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "branching": BRANCHING,
    "thinking": THINKING,
    "trimming": TRIMMING,
    "capturing": CAPTURING,
}

TEXT = st.lists(
    st.sampled_from(
        [
            "the",
            " key",
            "  ",
            "</think>",
            "<think>",
            "\n",
            "\n\n",
            "42",
            "é",
            "😀",
            "<|im",
            "_end|>",
            "<|im_end|>",
            "assistant",
            "user",
            "\x0b",
            " ",
        ]
    )
    | st.text(max_size=4),
    max_size=6,
).map("".join)


@st.composite
def conversations(draw):
    turns = draw(st.integers(1, 3))
    messages = [("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(turns):
        messages += [("user", draw(TEXT)), ("assistant", draw(TEXT))]
    weights = draw(st.sampled_from([(), (), (), (None, 0.0)]))
    return row(*messages, weights=weights, tools=draw(st.sampled_from([None, None, [{"name": "look_up"}]])))


@pytest.fixture(autouse=True, scope="module")
def cuts_are_found_once() -> Iterator[None]:
    """Finding where a pre-tokenizer cuts takes 0.35 s, and each example here makes an encoder of its own."""
    found, find = {}, word_cache._where_it_cuts

    def find_once(backend):
        key = bytes(backend.pre_tokenizer.__getstate__())
        if key not in found:
            found[key] = find(backend)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_cache, "_where_it_cuts", find_once)
        yield


def compare(rows, template, tokens, system=None, tokenizer=None):
    """How many of the rows are encoded as columns; the row encoder must make the same of each of them."""
    tokenizer = tokenizer or tiny_tokenizer(template)
    loaded = load_template(template if tokenizer.folder.name else "tokenizer", tokenizer)
    fast = ColumnEncoder(tokenizer, loaded, tokens, system)
    exact = RowEncoder(tokenizer, loaded, tokens, system).encode(rows)
    batch = pa.RecordBatch.from_pylist(rows, schema=ROWS)
    for _ in range(2):  # the second time with the layouts and words of the first
        found = fast.encode(batch)
        for at, index in enumerate(found.rows.tolist()):
            result = exact[index]
            assert isinstance(result, AcceptedRow), (rows[index]["messages"], result.reason, result.detail)
            assert to_batch(result.examples).equals(found.examples.slice(at, 1)), rows[index]["messages"]
            assert outcome_of(result) == found.layouts[found.layout[at]].outcome, rows[index]["messages"]
    return len(found.rows)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(conversations(), min_size=1, max_size=8),
    supervise=st.sampled_from(["completion", "assistant", "last_turn", "all"]),
    max_length=st.sampled_from([24, 512]),
    system=st.sampled_from([None, "Be brief."]),
)
def test_columns_are_what_the_row_encoder_makes(name, rows, supervise, max_length, system):
    compare(rows, TEMPLATES[name], TokensConfig(max_length=max_length, supervise=supervise), system)


PLAIN_ROWS = [
    row(
        ("system", "Be kind."),
        ("user", f"who may read report {i}"),
        ("assistant", f"user {i} may, says rule {i}"),
    )
    for i in range(20)
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ordinary_rows_are_all_encoded_as_columns(name):
    assert compare(PLAIN_ROWS, TEMPLATES[name], TokensConfig()) == len(PLAIN_ROWS)


def test_rows_whose_text_changes_the_rendering_are_left_to_the_row_encoder():
    rows = [
        row(("user", "which key"), ("assistant", text))
        for text in ("rotate the key", "</think> it is stale", "rotate it now", " it is stale")
    ]
    assert compare(rows, BRANCHING, TokensConfig()) == 2  # the template tests for "the" and "</think>"
    assert compare(rows, CHATML, TokensConfig()) == 4
    assert compare(rows, TRIMMING, TokensConfig()) == 3  # white space at the edge is trimmed


def test_what_a_template_looks_for_in_the_results_of_tools_is_tried_too():
    source = "{% for m in messages %}{% set c = m.content %}"
    source += "{% if m.role == 'tool' and 'FAILED' in c %}{% set c = 'Error: ' + c %}{% endif %}"
    source += _TURN + "{% endfor %}" + _END
    rows = [
        row(("user", "look"), ("assistant", "I do."), ("tool", result), ("assistant", "It is so."))
        for result in ("found it", "the search FAILED")
    ]
    assert compare(rows, source, TokensConfig()) == 1


def test_unusual_text_is_encoded_as_columns_but_forged_control_tokens_are_not():
    rows = [
        row(("user", "é\x0b"), ("assistant", "naïve 😀")),
        row(("user", "a <|im_end|>"), ("assistant", "never again")),
    ]
    assert compare(rows, CHATML, TokensConfig()) == 1


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | upper",
        "m.content[:5]",
        "m.content.replace('a', 'b')",
        "m.content | length",
        "m.content | tojson",
        "m.content in 'some text'",
        "m.content | list | first",
        "m.content.split(' ') | last",
        "(m.content + '!') is in ['a!']",
        "m.content * 2",
        "m.content | replace('a', 'b')",
        "messages | tojson",
        "messages | map(attribute='content') | join",
        "m.content < 'm'",
        "(m | string) | length",
        "m.content is lower",
        "{'a': 1}[m.content]",
    ],
)
def test_templates_that_alter_contents_have_no_layout(expression):
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ " + expression + " }}<|im_end|>{% endfor %}")
    template = load_template("tokenizer", tokenizer)
    assert find_layout(template, tokenizer, ("user", "assistant"), "completion") is None


@pytest.mark.parametrize(
    "expression", ["[c] | join(',')", "'%s' % c", "'{}'.format(c)", "c.replace('zzz', 'y')"]
)
def test_templates_that_keep_the_content_have_a_layout(expression):
    source = "{% for m in messages %}{% set c = m.content %}{% set c = " + expression + " %}"
    source += _TURN + "{% endfor %}" + _END
    assert compare(PLAIN_ROWS, source, TokensConfig()) == len(PLAIN_ROWS)
    replaced = row(("user", "zzz"), ("assistant", "a zzz"))
    assert compare([replaced], source, TokensConfig()) == ("zzz" not in expression)


@pytest.mark.parametrize(
    "test", ["c | length > 3000", "c | length < 3", "c is lower", "'&' in c", "c | int > 0"]
)
def test_templates_that_test_contents_without_a_string_constant_have_no_layout(test):
    source = (
        "{% for m in messages %}{% set c = m.content %}{% if "
        + test
        + " %}!{% endif %}"
        + _TURN
        + "{% endfor %}"
    )
    tokenizer = tiny_tokenizer(source + _END)
    template = load_template("tokenizer", tokenizer)
    assert find_layout(template, tokenizer, ("user", "assistant"), "completion") is None


@pytest.mark.shared_data
@pytest.mark.parametrize("supervise", ["completion", "assistant"])
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("qwen3", "tokenizer"),
        ("smollm2", "tokenizer"),
        ("minimind-6400", "tokenizer"),
        ("olmo2-dolma2", "tokenizer"),
        ("gpt2", "alpaca"),
        ("gpt2", "llama3"),
    ],
)
def test_rows_of_gsm8k_under_real_tokenizers_are_encoded_as_columns(shared_data, name, template, supervise):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:250]
    asked = [json.loads(line) for line in lines]
    rows = [row(("user", r["question"]), ("assistant", r["answer"])) for r in asked]
    several = [
        row(
            ("system", "Be brief."),
            ("user", a["question"]),
            ("assistant", a["answer"]),
            ("user", b["question"]),
            ("assistant", b["answer"]),
        )
        for a, b in zip(asked[:60], asked[60:120])
    ]
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
    tokens = TokensConfig(max_length=2048, supervise=supervise)
    found = compare(rows + several, template, tokens, tokenizer=tokenizer)
    assert found >= (300 if (name, supervise) != ("gpt2", "assistant") else 240)

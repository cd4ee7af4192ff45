"""Conditions on rows: what they mean, what they refuse, and that nothing of them is executed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.row_conditions import ConditionFailed, columns_of, compile_condition

ROW = {
    "reward": 0.5,
    "votes": "12",
    "label": "spam",
    "tags": ["a", "b"],
    "meta": {"lang": "en", "n": [1, {"x": 2}]},
    "odd name": "yes",
    "done": "True",
    "empty": None,
    "text": "Hello World",
}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("reward >= 0.5", True),
        ("reward > 0.5", False),
        ("votes > 2", True),  # "12" is 12, not text before "2"
        ("votes == 12", True),
        ("votes in [11, 12]", True),
        ("0 < votes <= 12", True),
        ('label != "spam"', False),
        ('label in ["ham", "spam"] and not (reward < 0)', True),
        ('"a" in tags', True),
        ('"c" not in tags', True),
        ('"World" in text', True),
        ('lower(text) == "hello world"', True),
        ("len(tags) == 2 and len(text) == 11", True),
        ('meta.lang == "en" and column("meta.n.1.x") == 2', True),
        ('column("odd name") == "yes"', True),
        ("done == true", True),
        ("empty == null and missing == null", True),
        ("empty != null or missing != null", False),
        ("missing > 1 or missing < 1", False),
        ('missing != "spam"', True),
        ("reward == -0.5 or reward == 0.5", True),
        (r'matches(text, "^Hel+o\\s")', True),
        ('matches(missing, "x")', False),
        ('column("meta.n.0") == 1', True),
    ],
)
def test_what_holds(condition: str, holds: bool) -> None:
    assert compile_condition(condition)(ROW) is holds


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "reward >",
        "__import__('os').system('true')",
        "text.upper()",
        "[x for x in tags]",
        "lambda: 1",
        "reward + 1 > 1",
        "text[0] == 'H'",
        "open(text)",
        'matches(text, "(")',
        'matches(text, "(?=x)")',
        "len(tags, text)",
        "f'{text}'",
        "b'x' == text",
        "1 if reward else 0",
        "(reward := 1) == 1",
        "x" * 3_000,
        "(" * 500 + "1" + ")" * 500,
    ],
)
def test_what_is_refused(condition: str) -> None:
    with pytest.raises(ValueError):
        compile_condition(condition)


@pytest.mark.parametrize("condition", ["label > 1", "tags < 2", "reward", "text", "len(text)"])
def test_a_row_that_does_not_fit_says_so(condition: str) -> None:
    with pytest.raises(ConditionFailed):
        compile_condition(condition)(ROW)


def test_a_pattern_that_backtracks_elsewhere_takes_linear_time() -> None:
    assert not compile_condition('matches(text, "^(a+)+$")')({"text": "a" * 50_000 + "b"})


def test_the_columns_that_are_read() -> None:
    text = 'meta.lang == "en" and not (len(tags) > 1 or column("odd name") == null) and lower(x) in [y, true]'
    assert columns_of(text) == {"meta.lang", "tags", "odd name", "x", "y"}


@given(st.text(max_size=40))
def test_any_text_is_a_condition_or_a_value_error(text: str) -> None:
    try:
        holds = compile_condition(text)
    except ValueError:
        return
    try:
        assert holds(ROW) in (True, False)
    except ConditionFailed:
        pass

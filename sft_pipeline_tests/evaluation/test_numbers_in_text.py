"""Numbers are read as people and models write them, and never as a part of themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.graders.numbers_in_text import last_number, numbers

CASES = {
    r"\frac{5}{2}": [2.5],
    r"-\dfrac{1}{2}": [-0.5],
    r"2\frac{1}{2}": [2.5],
    "½": [0.5],
    "1½": [1.5],
    "¾ cup": [0.75],
    "1 million": [1e6],
    "2.5 billion people": [2.5e9],
    "10^6": [1e6],
    "10^{-3}": [1e-3],
    r"3 \times 10^4": [3e4],
    "3×10^4": [3e4],
    "2^3": [8],
    "1e6": [1e6],
    "–3": [-3],
    "−3": [-3],
    "(-3)": [-3],
    "1 234": [1234],
    "1\u00a0234": [1234],
    "1\u202f234\u202f567": [1234567],
    "1_234": [1234],
    "1,234.5": [1234.5],
    r"\$18": [18],
    "$-5": [-5],
    "40%": [40],
    "10–5": [10, 5],
    "3/4": [0.75],
    "2 1/2": [2.5],
    "5 apples and 300 pears": [5, 300],
    "in 2020 100 people": [2020, 100],
    "1 2 3": [1, 2, 3],
    "7 x 10": [7, 10],
    "10^400": [],
}


@pytest.mark.parametrize("text", CASES)
def test_numbers(text: str) -> None:
    assert numbers(text) == pytest.approx(CASES[text])


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{:d}", "{:,d}", "{:_d}", "so it is {:d}.", "**{:,d}**", "${:,d}", r"\boxed{{{:d}}}"]),
)
def test_a_whole_number_in_any_style_is_read_back(value: int, style: str) -> None:
    assert last_number(style.format(value)) == value


@given(st.integers(0, 10**9), st.sampled_from(" \u00a0\u2009\u202f"))
def test_groups_of_three_with_spaces(value: int, space: str) -> None:
    assert last_number(f"{value:,}".replace(",", space)) == value

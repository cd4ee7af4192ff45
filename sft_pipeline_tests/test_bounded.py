"""Tasks in a bounded process: results, bounds, and failures of the process itself."""

import json
import os
from collections.abc import Callable

import pytest

from sft_pipeline import bounded, bounded_child
from sft_pipeline.bounded import BoundedTask, OutOfBounds
from sft_pipeline.errors import InputError


def shouting(mark: str) -> Callable[[str], str]:
    return lambda text: text.upper() + mark


def refusing() -> Callable[[str], str]:
    raise ImportError("no such library here")


def raising() -> Callable[[str], str]:
    return json.loads


def ending(code: int) -> Callable[[str], str]:
    return lambda text: os._exit(code)


def test_texts_in_results_out_and_again() -> None:
    task = BoundedTask(shouting, "!")
    assert task(["a", "é\n"]) == ["A!", "É\n!"] and task(["b"]) == ["B!"] and task([]) == []


def test_a_process_that_cannot_begin_is_not_blamed_on_the_text() -> None:
    with pytest.raises(InputError, match=r"process for refusing failed .*ImportError: no such library here"):
        BoundedTask(refusing)(["a"])


def test_a_process_that_ends_by_itself_says_its_code() -> None:
    with pytest.raises(InputError, match="exit code 7"):
        BoundedTask(ending, 7)(["a"])


def test_what_the_function_raises_is_told_and_the_next_text_is_served() -> None:
    task = BoundedTask(raising)
    with pytest.raises(OutOfBounds, match="failed with JSONDecodeError"):
        task(["{"])
    assert task(["1"]) == [1]


def test_time_and_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    slow = BoundedTask(bounded_child.full_match, r"(a+)+b")
    with pytest.raises(OutOfBounds, match=r"within 0\.2 s"):
        slow(["a" * 40])
    assert slow(["aab"]) == [True], "the next call starts another process"

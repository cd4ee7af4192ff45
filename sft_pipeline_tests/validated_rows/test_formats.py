"""Every known format becomes the same kind of conversation."""

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.stages.validated_rows.config import ContractConfig
from sft_pipeline.stages.validated_rows.formats import normalize
from sft_pipeline.stages.validated_rows.normalized_row import NormalizedRow
from sft_pipeline.stages.validated_rows.validate import CONTROL_TOKEN, check_contract, may_warn, warnings_of


def read(
    format_: str, row: dict[str, Any], columns: dict[str, str] | None = None, **contract: Any
) -> NormalizedRow:
    normalized = normalize(format_, row, columns or {})
    check_contract(normalized, ContractConfig(**contract))
    return normalized


def turns_of(row: NormalizedRow) -> list[tuple[str, str]]:
    assert row.reasons == []
    return [(m["role"], m["content"]) for m in row.messages]


PAIR = [("user", "Q"), ("assistant", "A")]
CALL = '{"name":"find","arguments":{"x":1}}'
CALLS = '[{"type":"function","function":{"name":"find","arguments":{"x":1}}}]'


@pytest.mark.parametrize(
    ("format_", "row", "columns", "expected"),
    [
        ("prompt_completion", {"prompt": "Q", "completion": "A"}, {}, PAIR),
        (
            "prompt_completion",
            {"prompt": "Q", "completion": "A", "system": "S"},
            {},
            [("system", "S"), *PAIR],
        ),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "A"}],
            },
            {},
            [("system", "S"), *PAIR],
        ),
        (
            "prompt_completion",
            {"in": {"text": ["x", "Q"]}, "out.put": "A"},
            {"prompt": "in.text.1", "completion": "out.put"},
            PAIR,
        ),
        (
            "instruction",
            {"instruction": "Q", "input": "I", "output": "A"},
            {},
            [("user", "Q\n\nI"), ("assistant", "A")],
        ),
        ("instruction", {"instruction": "Q", "input": "", "output": "A"}, {}, PAIR),
        (
            "instruction",
            {"instruction": "Q", "input": None, "output": "A", "system": "", "history": [["a", "b"]]},
            {},
            [("user", "a"), ("assistant", "b"), *PAIR],
        ),
        ("instruction", {"instruction": "Q", "output": "A"}, {}, PAIR),
        (
            "dolly",
            {"instruction": "Q", "context": "C", "response": "A", "category": "x"},
            {},
            [("user", "Q\n\nC"), ("assistant", "A")],
        ),
        (
            "question_response",
            {"system_prompt": "S", "question": "Q", "response": "A"},
            {},
            [("system", "S"), *PAIR],
        ),
        ("question_response", {"question": "Q", "answer": "A"}, {"response": "answer"}, PAIR),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            {},
            PAIR,
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
                "system": "S",
            },
            {},
            [("system", "S"), *PAIR],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            {},
            PAIR,
        ),
        (
            "messages",
            {"chat": [{"speaker": "Human", "text": "Q"}, {"speaker": "assistant", "text": "A"}]},
            {"messages": "chat", "role": "speaker", "content": "text"},
            PAIR,
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "A"}]},
                ]
            },
            {},
            PAIR,
        ),
    ],
)
def test_formats(
    format_: str, row: dict[str, Any], columns: dict[str, str], expected: list[tuple[str, str]]
) -> None:
    assert turns_of(read(format_, row, columns)) == expected


def test_loss_weights_of_messages_are_kept() -> None:
    turns = [
        ("user", "weight", 0),
        ("assistant", "loss", False),
        ("user", "loss_weight", 0.5),
        ("assistant", "loss", True),
        ("user", "weight", None),
        ("assistant", "x", 1),
    ]
    found = read(
        "messages", {"messages": [{"role": r, "content": "c", key: value} for r, key, value in turns]}
    )
    assert [m["weight"] for m in found.messages] == [0.0, 0.0, 0.5, 1.0, None, None]
    assert read(
        "messages",
        {"messages": [{"role": "user", "content": "c", "weight": -1}, {"role": "assistant", "content": "c"}]},
    ).reasons == ["wrong_type"]


def test_function_calls_become_tool_calls_and_tool_turns() -> None:
    turns = [("human", "Q"), ("function_call", CALL), ("observation", "R"), ("gpt", "A")]
    found = read(
        "sharegpt",
        {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": '[{"name": "find"}]'},
    )
    assert turns_of(found) == [("user", "Q"), ("assistant", ""), ("tool", "R"), ("assistant", "A")]
    assert [m["tool_calls"] for m in found.messages] == [None, CALLS, None, None]
    assert json.loads(found.tools or "") == [{"type": "function", "function": {"name": "find"}}]
    openai = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"x": 1}'}}],
    }
    found = read("messages", {"messages": [{"role": "user", "content": "Q"}, openai], "tools": []})
    assert found.reasons == [] and found.tools is None
    assert json.loads(found.messages[1]["tool_calls"]) == openai["tool_calls"]  # text stays text


def _messages(*turns: Any) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


U, A = ("user", "Q"), ("assistant", "A")


@pytest.mark.parametrize(
    ("format_", "row", "reasons"),
    [
        ("prompt_completion", {"prompt": "Q"}, ["missing_field"]),
        ("prompt_completion", {"prompt": "Q", "completion": None}, ["empty_completion"]),
        ("prompt_completion", {"prompt": "Q", "completion": " \n"}, ["empty_completion"]),
        ("prompt_completion", {"prompt": "", "completion": ""}, ["empty_prompt", "empty_completion"]),
        ("prompt_completion", {"prompt": 5, "completion": ""}, ["wrong_type", "empty_completion"]),
        (
            "prompt_completion",
            {"prompt": "Q" * 11, "completion": "A" * 6},
            ["prompt_too_long", "completion_too_long"],
        ),
        ("messages", {"messages": []}, ["no_final_completion", "empty_prompt"]),
        ("messages", {"messages": None}, ["missing_field"]),
        ("messages", {"messages": "Q"}, ["wrong_type"]),
        ("messages", {"messages": ["Q", "A"]}, ["wrong_type"]),
        ("messages", _messages(U), ["no_final_completion"]),
        ("messages", _messages(A), ["roles_do_not_alternate", "empty_prompt"]),
        ("messages", _messages(U, U, A), ["roles_do_not_alternate"]),
        ("messages", _messages(U, A, ("system", "S"), U, A), ["roles_do_not_alternate"]),
        ("messages", _messages(U, A, ("tool", "R"), A), ["roles_do_not_alternate"]),
        ("messages", _messages(U, ("narrator", "N"), A), ["illegal_role"]),
        ("messages", _messages(U, (7, "N"), A), ["illegal_role"]),
        (
            "messages",
            {"messages": [{"content": "Q"}, {"role": "assistant", "content": "A"}]},
            ["missing_field"],
        ),
        ("messages", _messages(U, ("assistant", ""), U, A), ["empty_message"]),
        ("messages", _messages(U, ("assistant", None)), ["empty_completion"]),
        ("messages", _messages(U, ("assistant", 5)), ["wrong_type"]),
        (
            "messages",
            _messages(("user", [{"type": "image_url", "image_url": "x"}]), A),
            ["unsupported_content"],
        ),
        ("messages", _messages(U, ("function_call", "not json")), ["invalid_tool_call"]),
        (
            "messages",
            _messages(U, ("function_call", '{"name": "f", "arguments": "no"}')),
            ["invalid_tool_call"],
        ),
        ("messages", {**_messages(U, A), "tools": "{"}, ["invalid_tools"]),
        (
            "messages",
            _messages(U, ("function_call", '{"name": "\\ud800", "arguments": {}}')),
            ["invalid_tool_call"],
        ),
        ("messages", {**_messages(U, A), "tools": '[{"name": "\\ud800"}]'}, ["invalid_tools"]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "Q", "weight": 10**400},
                    {"role": "assistant", "content": "A", "weight": 1e39},
                ]
            },
            ["wrong_type"],
        ),
        ("instruction", {"instruction": "Q", "input": 3, "output": "A"}, ["wrong_type"]),
        ("instruction", {"instruction": "Q", "history": [["a"]], "output": "A"}, ["wrong_type"]),
    ],
)
def test_all_reasons_of_a_row_are_listed(format_: str, row: dict[str, Any], reasons: list[str]) -> None:
    assert read(format_, row, max_prompt_chars=10, max_completion_chars=5).reasons == reasons


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|endoftext|>",
        "<|end|>",
        "<|user|>",
        "<|start_header_id|>",
        "[INST]",
        "[/INST]",
        "<s>",
        "</s>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<<SYS>>",
        "<think>",
        "</tool_call>",
        "<｜end▁of▁sentence｜>",
        "<eos>",
        "<bos>",
        "[TOOL_CALLS]",
    ],
)
def test_control_tokens_of_any_family_are_a_warning(token: str) -> None:
    found = read("prompt_completion", {"prompt": f"say {token} now", "completion": "A"})
    assert found.reasons == [] and warnings_of(found.messages) == [f"control_token:{token}"]


def test_ordinary_text_is_no_warning() -> None:
    text = "if a < b and c > d: x[INSTANCE] |> <<48/2=24>>24 <b>bold</b> <pre> <system> a|b [1]\ttab\r\n"
    assert warnings_of(read("prompt_completion", {"prompt": text, "completion": "A"}).messages) == []
    assert warnings_of(read("prompt_completion", {"prompt": "bell\x07", "completion": "A"}).messages) == [
        "control_character"
    ]


@given(st.lists(st.text() | st.from_regex(CONTROL_TOKEN) | st.text("<|>[/]sINT｜\n\x00\x7f"), min_size=1))
def test_the_search_in_a_whole_column_misses_no_warning(texts: list[str]) -> None:
    messages = [{"content": text, "tool_calls": None} for text in texts]
    column = pa.array([*texts, None], pa.string())
    assert may_warn(column).tolist() == [bool(warnings_of([m])) for m in messages] + [False]

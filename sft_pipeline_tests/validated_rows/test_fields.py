"""Nothing that a row says is lost on the way to its messages: kept, counted, or a reason to reject it."""

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_pipeline.stages.validated_rows.config import ContractConfig, SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.validate import RowValidator, ValidatedBatch

USER = {"role": "user", "content": "Q"}


def validate(*lines: str, format_: str = "messages", **shape: Any) -> ValidatedBatch:
    """What becomes of rows as they stand in a file."""
    shapes = [SourceShape(format=format_, columns=shape.get("columns", {}), unused=shape.get("unused", []))]
    config = ValidatedRowsConfig(contract=ContractConfig(), shapes=shapes)
    count = len(lines)
    batch = pa.RecordBatch.from_pydict(
        {
            "row_id": [f"{i:032x}" for i in range(count)],
            "source": pa.array([0] * count, pa.int32()),
            "file": ["f"] * count,
            "line": list(range(1, count + 1)),
            "content": list(lines),
        }
    )
    return RowValidator(config, [None])(batch)


def replies(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    """The last message of the row that is made of these, without fields that it has not."""
    found = validate(json.dumps({"messages": [USER, *messages], **row}))
    assert found.reasons == []
    last = found.rows.column("messages").to_pylist()[0][-1]
    return {name: value for name, value in last.items() if value is not None}


def refusals(*messages: dict[str, Any]) -> list[str]:
    """Why the row that is made of these is rejected."""
    (reasons,) = validate(json.dumps({"messages": [USER, *messages]})).reasons
    return reasons


@pytest.mark.parametrize("alias", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept_under_each_of_its_names(alias: str) -> None:
    found = replies({"role": "assistant", alias: "Three times two is six.", "content": "Six."})
    assert found == {"role": "assistant", "content": "Six.", "reasoning_content": "Three times two is six."}


@pytest.mark.parametrize("content", ["", None])
def test_a_message_may_be_reasoning_alone(content: str | None) -> None:
    found = replies({"role": "assistant", "reasoning_content": "Hm.", "content": content})
    assert found == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert replies({"role": "assistant", "thinking": "Hm."}) == found


def test_reasoning_among_the_parts_of_a_message() -> None:
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Six."}]
    found = replies({"role": "assistant", "content": parts})
    assert found == {"role": "assistant", "content": "Six.", "reasoning_content": "Hm."}


def test_reasoning_beside_a_prompt_and_its_completion() -> None:
    found = validate('{"prompt": "Q", "completion": "A", "reasoning": "Hm."}', format_="prompt_completion")
    assert found.rows.column("messages").to_pylist()[0][-1]["reasoning_content"] == "Hm."


def test_rows_that_differ_in_their_reasoning_are_no_duplicates() -> None:
    lines = [
        json.dumps({"messages": [USER, {"role": "assistant", "content": "A", "reasoning": r}]}) for r in "xy"
    ]
    found = validate(*lines)
    assert len(set(found.keys)) == len(set(found.rows.column("content_key").to_pylist())) == 2


ARGUMENTS = '{"when":"Friday","guests":4,"a":1.50}'
CALL = f'{{"id":"c1","type":"function","function":{{"name":"book","arguments":{ARGUMENTS}}}}}'


def test_calls_and_tools_are_spelled_as_in_the_row() -> None:
    tools = '[{"type":"function","function":{"name":"book","strict":true,"parameters":{"b":1e3,"a":-0}}}]'
    turns = f'{{"role":"user","content":"Q"}},{{"role":"assistant","tool_calls":[{CALL}]}}'
    line = f'{{"messages":[{turns}],"tools":{tools}}}'
    found = validate(line)
    assert found.rows.column("messages").to_pylist()[0][-1]["tool_calls"] == f"[{CALL}]"
    assert found.rows.column("tools").to_pylist() == [tools]


def test_arguments_that_are_text_stay_text() -> None:
    text = '{"when":"Friday", "guests": 4, "a":1.50}'
    call = {"type": "function", "function": {"name": "book", "arguments": text}}
    found = json.loads(replies({"role": "assistant", "tool_calls": [call]})["tool_calls"])
    assert found == [call]


@pytest.mark.parametrize("empty", [None, "", "null"])
def test_empty_arguments_are_none(empty: Any) -> None:
    call = {"type": "function", "function": {"name": "now", "arguments": empty}}
    found = json.loads(replies({"role": "assistant", "tool_calls": [call]})["tool_calls"])
    assert found[0]["function"] == {"name": "now", "arguments": {}}


def test_rows_that_differ_in_the_order_of_arguments_are_duplicates_with_tokens_of_their_own() -> None:
    lines = [
        json.dumps({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": a}]}]})
        for a in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ]
    found = validate(*lines)
    assert len(set(found.keys)) == 1
    assert len(set(found.rows.column("content_key").to_pylist())) == 2


@pytest.mark.parametrize(
    "tools",
    [
        '{"name": "f"}',
        '[{"name": "f"}]',
        '"[{\\\\"name\\\\": \\\\"f\\\\"}]"'.replace("\\\\", "\\"),
        '["{\\"name\\": \\"f\\"}"]',
        '[{"type": "function", "function": {"name": "f"}}]',
    ],
)
def test_every_way_to_declare_a_tool(tools: str) -> None:
    for key in ("tools", "functions"):
        line = (
            f'{{"messages": [{json.dumps(USER)}, {{"role": "assistant", "content": "A"}}], "{key}": {tools}}}'
        )
        found = validate(line).rows.column("tools").to_pylist()
        assert found == ['[{"type":"function","function":{"name":"f"}}]']


@pytest.mark.parametrize("none", ["null", '""', '"null"', '"[]"', "[]", "{}"])
def test_no_tools(none: str) -> None:
    line = f'{{"messages": [{json.dumps(USER)}, {{"role": "assistant", "content": "A"}}], "tools": {none}}}'
    assert validate(line).rows.column("tools").to_pylist() == [None]


def test_results_keep_the_name_and_the_call_that_they_belong_to() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [json.loads(CALL)]}
    result = {"role": "tool", "name": "book", "tool_call_id": "c1", "content": "done"}
    found = validate(
        json.dumps({"messages": [USER, call, result, {"role": "assistant", "content": "Booked."}]})
    )
    tool = found.rows.column("messages").to_pylist()[0][2]
    assert (tool["name"], tool["tool_call_id"], tool["content"]) == ("book", "c1", "done")


def test_a_function_call_of_the_older_form() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": "1"}
    found = validate(json.dumps({"messages": [USER, call, result, {"role": "assistant", "content": "One."}]}))
    messages = found.rows.column("messages").to_pylist()[0]
    assert json.loads(messages[1]["tool_calls"])[0]["function"] == call["function_call"]
    assert (messages[2]["role"], messages[2]["name"]) == ("tool", "f")


@pytest.mark.parametrize(
    ("key", "value", "weight"), [("train", False, 0.0), ("weight", 0.5, 0.5), ("train", True, 1.0)]
)
def test_weights(key: str, value: Any, weight: float) -> None:
    assert replies({"role": "assistant", "content": "A", key: value})["weight"] == weight


def test_system_beside_an_empty_system_turn_is_kept() -> None:
    turns = [{"from": "system", "value": ""}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    found = validate(json.dumps({"conversations": turns, "system": "Be brief."}), format_="sharegpt")
    messages = found.rows.column("messages").to_pylist()[0]
    assert [m["content"] for m in messages] == ["Be brief.", "Q", "A"]


def test_two_different_system_messages_are_refused_by_name() -> None:
    found = validate(
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "One"},
                    USER,
                    {"role": "assistant", "content": "A"},
                ],
                "system": "Two",
            }
        )
    )
    assert found.reasons == [["unused_field: system"]]


@pytest.mark.parametrize(
    "turn", [{"value": "", "content": "A"}, {"value": "A", "content": ""}, {"content": None, "value": "A"}]
)
def test_the_text_that_is_not_empty_wins(turn: dict[str, Any]) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", **turn}]}
    found = validate(json.dumps(row), format_="sharegpt")
    assert found.rows.column("messages").to_pylist()[0][-1]["content"] == "A"


@pytest.mark.parametrize("key", ["images", "Image", "toolCalls", "system_prompt", "train", "videos"])
def test_a_key_that_would_change_what_is_trained_is_refused_by_name(key: str) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "A"}], key: "x"}
    assert validate(json.dumps(row)).reasons == [[f"unused_field: {key}"]]
    assert validate(json.dumps(row), unused=[key]).reasons == []
    assert validate(json.dumps({**row, key: None})).reasons == []


@pytest.mark.parametrize("key", ["reasoningContent", "thought", "toolcalls", "images"])
def test_a_key_of_a_message_under_another_spelling_is_refused_by_name(key: str) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "A", key: "x"}]}
    assert validate(json.dumps(row)).reasons == [[f"unused_field: {key}"]]
    assert validate(json.dumps(row), unused=[f"messages[].{key}"]).reasons == []


def test_other_keys_are_counted() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "A", "id": 7}], "score": 1, "topic": "x"}
    found = validate(json.dumps(row), json.dumps(row))
    assert found.reasons == []
    assert found.unused == {"score": 2, "topic": 2, "messages[].id": 2}


TEXT = st.text("abcXYZ \n{}\"'é中", min_size=1, max_size=8).filter(str.strip)
FIELD = st.sampled_from(
    ["content", "reasoning_content", "reasoning", "name", "tool_call_id", "images", "thought", "note", "id"]
)


@given(
    st.lists(st.dictionaries(FIELD, TEXT, max_size=4), min_size=1, max_size=3),
    st.dictionaries(FIELD, TEXT, max_size=2),
)
def test_every_text_of_a_row_is_kept_counted_or_refused(
    turns: list[dict[str, str]], row: dict[str, str]
) -> None:
    messages = [m for turn in turns for m in (USER, {"role": "assistant", "content": "A", **turn})]
    found = validate(json.dumps({"messages": messages, **row}))
    if found.reasons:
        return
    kept = found.rows.column("messages").to_pylist()[0]
    for given_message, message in zip(messages, kept, strict=True):
        texts = "\0".join(str(v) for v in message.values())
        for key, value in given_message.items():
            assert str(value) in texts or found.unused[f"messages[].{key}"]
    assert all(found.unused[key] for key in row)


@pytest.mark.parametrize(
    "message", [{"weight": 1, "train": False}, {"loss": True, "train": 0}, {"weight": 2, "loss": 3}]
)
def test_two_weights_that_contradict_each_other_reject_the_row(message: dict[str, Any]) -> None:
    assert refusals({"role": "assistant", "content": "A", **message})[0].startswith("unused_field: ")


@pytest.mark.parametrize("weight", [-1, 1e-50, 0.0009, 1001, 3e38, "1", [1]])
def test_a_weight_that_training_could_not_keep_rejects_the_row(weight: Any) -> None:
    assert refusals({"role": "assistant", "content": "A", "weight": weight}) == ["wrong_type"]


@pytest.mark.parametrize("message", [{"weight": 0, "train": False}, {"weight": 1, "loss": True}])
def test_two_weights_that_agree_are_one(message: dict[str, Any]) -> None:
    assert replies({"role": "assistant", "content": "A", **message})["weight"] in (0, 1)

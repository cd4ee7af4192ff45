import json

import pytest
from pydantic import TypeAdapter

from sft_pipeline.errors import InputError
from sft_pipeline.graders import graders as g
from sft_pipeline.graders.config import GraderConfig
from sft_pipeline.graders.graders import Unparsable, json_equal, parse_json
from sft_pipeline.graders.numbers_in_text import first_number_after, last_number, numbers

ROW = {"row_id": "r1", "group": "g", "prompt": "p", "completion": "c"}


def grader(**values):
    return g.make_graders([TypeAdapter(GraderConfig).validate_python({"name": "it", **values})])[0]


def score(which, reply, completion=""):
    return which(reply, completion, ROW)


# -- strict JSON
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{} x",
        "```json\n{}\n```",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        "[Infinity]",
        "{'a': 1}",
        '{"a": 1,}',
        "[" * 100_000,
    ],
)
def test_what_is_not_strict_json_is_unparsable(text):
    with pytest.raises(Unparsable):
        parse_json(text)


def test_white_space_around_json_is_allowed():
    assert parse_json('\n {"a": [1, null]} \n') == {"a": [1, None]}


def test_json_equality_keeps_true_and_one_apart():
    assert json_equal(1, 1.0) and json_equal({"a": [True]}, {"a": [True]})
    assert (
        not json_equal(1, True)
        and not json_equal([0], [False])
        and not json_equal("1", 1)
        and not json_equal(None, 0)
    )


# -- json_schema
# --------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "required": ["decision"],
    "properties": {"decision": {"enum": ["approve", "deny"]}},
    "additionalProperties": False,
}


def test_json_schema_scores_valid_invalid_and_unparsable():
    it = grader(kind="json_schema", schema=SCHEMA)
    assert [
        score(it, r)
        for r in (
            '{"decision": "deny"}',
            '{"decision": "maybe"}',
            '{"decision": "deny", "x": 1}',
            "deny",
            "",
            '{"decision": "deny"',
        )
    ] == [1, 0, 0, 0, 0, 0]


def test_json_schema_from_a_file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert score(grader(kind="json_schema", schema=str(path)), '{"decision": "approve"}') == 1


@pytest.mark.parametrize(
    "content, message",
    [(None, "cannot be read"), ("{", "is not JSON"), ('{"type": "objct"}', "not a JSON Schema")],
)
def test_a_bad_schema_file_is_named_with_its_grader(tmp_path, content, message):
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"grader it.*{message}"):
        grader(kind="json_schema", schema=str(path))


def test_a_reference_out_of_the_schema_is_an_error_and_no_download():
    with pytest.raises(InputError, match=r"grader it.*example.com"):
        grader(kind="json_schema", schema={"$ref": "https://example.com/schema.json"})


# -- json_fields
# --------------------------------------------------------------------------------------------------


def test_json_fields_compare_with_the_parsed_completion():
    it = grader(kind="json_fields", fields=["decision", "who.id"])
    want = '{"decision": "deny", "who": {"id": 7}, "note": "x"}'
    assert score(it, '{"note": "other", "who": {"id": 7.0}, "decision": "deny"}', want) == 1
    assert score(it, '{"decision": "deny", "who": {"id": 8}}', want) == 0
    assert score(it, '{"decision": "deny"}', want) == 0
    assert score(it, '["deny"]', want) == 0
    assert score(it, "not json", want) == 0


def test_optional_fields_may_be_absent_on_both_sides_but_a_misspelt_one_is_reported():
    it = grader(kind="json_fields", fields=["a", "b"])
    assert score(it, '{"a": 1}', '{"a": 1}') == 1
    assert score(it, '{"a": 1, "b": 2}', '{"a": 1}') == 0
    assert g.check_expected([it], [("r1", '{"a": 1}'), ("r2", '{"b": 1}'), ("r3", "no json")]) == {"it": 1}
    with pytest.raises(InputError, match="grader it: no expected completion has the field 'b'"):
        g.check_expected([it], [("r1", '{"a": 1}'), ("r2", '{"a": 2}')])


def test_a_grader_that_fits_no_completion_is_reported():
    with pytest.raises(InputError, match=r"grader it: no expected completion.*row r1.*not JSON"):
        g.check_expected([grader(kind="json_fields", fields=["a"])], [("r1", "yes"), ("r2", "no")])


# -- text
# ---------------------------------------------------------------------------------------------------------


def test_exact_match():
    assert score(grader(kind="exact_match"), " yes\n", "yes") == 1
    assert score(grader(kind="exact_match"), "Yes", "yes") == 0
    assert score(grader(kind="exact_match", ignore_case=True), "STRASSE", "straße") == 1


def test_regex_found_and_group_equal():
    assert score(grader(kind="regex", pattern=r"^\w+$"), "word") == 1
    assert score(grader(kind="regex", pattern=r".*"), "  ") == 0  # an empty reply is never right
    it = grader(kind="regex", pattern=r"class: (\w+)", group=1)
    assert score(it, "I say class: loan!", "class: loan") == 1
    assert score(it, "class: card", "class: loan") == 0
    assert score(it, "loan", "class: loan") == 0
    with pytest.raises(InputError, match=r"grader it.*group 2"):
        grader(kind="regex", pattern="(a)", group=2)
    with pytest.raises(InputError, match=r"grader it.*not a regular expression"):
        grader(kind="regex", pattern="(")


# -- numbers
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, found",
    [
        ("-1,234.50 dollars", [-1234.5]),
        ("$18", [18]),
        ("-$5 or $-6", [-5, -6]),
        ("3/4 cup", [0.75]),
        ("2 1/2 cups", [2.5]),
        ("1e3 and .5", [1000, 0.5]),
        ("40%", [40]),
        ("10-5=5.", [10, 5, 5]),
        ("1,000,000", [1e6]),
        ("12,34", [12, 34]),
        ("1/0", []),
        ("−7", [-7]),
        ("€ 1,200", [1200]),
        ("no", []),
        ("3, 4 and 5", [3, 4, 5]),
    ],
)
def test_numbers_as_people_write_them(text, found):
    assert numbers(text) == pytest.approx(found)


def test_numeric_answer_after_the_mark():
    it = grader(kind="numeric_answer", after="####")
    gold = "He has 3 + 4 = 7 dozen.\n#### 1,234"
    assert score(it, "so 5 and 6\n#### $1234.00", gold) == 1
    assert score(it, "#### 1235", gold) == 0
    assert score(it, "the answer is 1234", gold) == 0
    assert score(it, "####", gold) == 0
    assert first_number_after("#### 1 #### 2 apples 3", "####") == 2
    assert last_number("1 then 2") == 2


def test_numeric_answer_without_a_mark_takes_the_last_number_within_the_tolerance():
    it = grader(kind="numeric_answer", tolerance=0.01)
    assert score(it, "first 3, then 3.141", "3.14") == 1
    assert score(it, "3.2", "3.14") == 0


# -- python
# -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "my_helper_mod.py").write_text("LIMIT = 1\n")
    (tmp_path / "my_graders_mod.py").write_text(
        "import my_helper_mod\n"
        "def good(reply, completion, row): return reply == completion and row['group'] == 'g'\n"
        "def broken(reply, completion, row): return 1 / 0\n"
        "def strange(reply, completion, row): return 'high'\n"
        "NUMBER = 3\n"
    )
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(tmp_path))
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_python_grader_scores_and_is_never_given_an_empty_reply(project):
    it = grader(kind="python", callable="my_graders_mod:good")
    assert score(it, "a", "a") == 1 and score(it, "b", "a") == 0
    assert score(grader(kind="python", callable="my_graders_mod:broken"), " \n") == 0


@pytest.mark.parametrize(
    "name, message", [("broken", "row r1.*ZeroDivisionError"), ("strange", "row r1.*'high'")]
)
def test_an_exception_in_a_python_grader_names_grader_and_row(project, name, message):
    with pytest.raises(InputError, match=f"grader it, {message}"):
        score(grader(kind="python", callable=f"my_graders_mod:{name}"), "x")


@pytest.mark.parametrize(
    "target, message",
    [
        ("no_such_mod:f", "No module named"),
        ("my_graders_mod:nothing", "nothing"),
        ("my_graders_mod:NUMBER", "not callable"),
    ],
)
def test_what_cannot_be_imported_names_the_grader(project, target, message):
    with pytest.raises(InputError, match=f"grader it.*{message}"):
        grader(kind="python", callable=target)


def test_a_python_graders_sources_are_found_with_what_they_import(project):
    from sft_pipeline.user_code import function_sources

    config = TypeAdapter(GraderConfig).validate_python(
        {"name": "it", "kind": "python", "callable": "my_graders_mod:good"}
    )
    assert sorted(function_sources("grader mine", config.callable)) == [
        "my_graders_mod.py",
        "my_helper_mod.py",
    ]


# -- what stands around an answer
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think>It is 7, not 6.</think>", ""])
def test_a_thinking_block_before_the_answer_is_no_part_of_it(block):
    assert score(grader(kind="json_fields", fields=["a"]), f'{block}{{"a": 1}}', '{"a": 1}') == 1
    assert score(grader(kind="exact_match"), f"{block}six", "six") == 1
    assert score(grader(kind="numeric_answer"), f"{block}6", "6") == 1


def test_thinking_without_an_answer_scores_0():
    assert score(grader(kind="numeric_answer"), "<think>so it is 6", "6") == 0
    assert score(grader(kind="exact_match"), "<think>six</think>", "six") == 0


def test_a_completion_that_itself_begins_with_thinking_is_compared_whole():
    assert score(grader(kind="exact_match"), "<think>a</think>six", "<think>a</think>six") == 1
    assert score(grader(kind="exact_match"), "<think>b</think>six", "<think>a</think>six") == 0


def test_a_code_fence_is_read_where_it_is_allowed():
    reply = '```json\n{"a": 1}\n```'
    for kind in (
        {"kind": "json_fields", "fields": ["a"]},
        {"kind": "json_schema", "schema": {"type": "object"}},
    ):
        assert score(grader(**kind), reply, '{"a": 1}') == 0
        assert score(grader(**kind, fenced=True), reply, '{"a": 1}') == 1
        assert score(grader(**kind, fenced=True), '{"a": 1}', '{"a": 1}') == 1
        assert score(grader(**kind, fenced=True), f"Here:\n{reply}", '{"a": 1}') == 0

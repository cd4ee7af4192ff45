"""What a recipe gives to grade with, and what a model replies: bounded, no download, no late surprise."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from sft_pipeline import bounded
from sft_pipeline.errors import InputError
from sft_pipeline.graders.config import GraderConfig
from sft_pipeline.graders.graders import Grader, check_expected, make_graders
from sft_pipeline.json_schemas import MOST_BYTES, MOST_LEVELS

ENDLESS = "(a+)+$"
HOSTILE = "a" * 60 + "!"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def grader(**values: Any) -> Grader:
    [made] = make_graders([TypeAdapter(GraderConfig).validate_python({"name": "it", **values})])
    return made


def score(which: Grader, reply: str, completion: str = "") -> float:
    return which(reply, completion, {"row_id": "r1", "group": "g", "prompt": "p", "completion": completion})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 0.2)


def test_a_pattern_without_end_is_named_with_its_row(impatient: None) -> None:
    it = grader(kind="regex", pattern=ENDLESS)
    assert score(it, "aaaa") == 1
    with pytest.raises(InputError, match=r"grader it, row r1: the pattern '\(a\+\)\+\$' did not finish"):
        score(it, HOSTILE)
    assert score(it, "b aaaa") == 1  # it goes on with the next reply
    with pytest.raises(InputError, match=r"grader it, expected completion of row r7: the pattern"):
        check_expected([grader(kind="regex", pattern=ENDLESS, group=1)], [("r7", HOSTILE)])


@pytest.mark.parametrize(
    "pattern, reply, found",
    [
        (r"^\w+$", "हि", 0),  # as `re` reads it; the package `regex` takes the vowel sign as a letter
        (r"box{e}", "box{e}", 1),
        (r"a[^\s]", "a\x1c", 0),
        (r"(?i)STRASSE", "straße", 0),
        (r"^b", "a\nb", 0),
        ("\ud800", "x \ud800", 1),
    ],
)
def test_patterns_are_read_as_re_reads_them(pattern: str, reply: str, found: float) -> None:
    assert score(grader(kind="regex", pattern=pattern), reply) == found


@pytest.mark.parametrize("pattern", ["(", "(" * 5_000 + ")" * 5_000, "a{99999999999}"])
def test_what_is_no_pattern_is_one_message(pattern: str) -> None:
    with pytest.raises(InputError, match="grader it: not a regular expression"):
        grader(kind="regex", pattern=pattern)


@pytest.mark.parametrize(
    "schema, reply",
    [
        ({"pattern": ENDLESS}, json.dumps(HOSTILE)),
        ({"patternProperties": {ENDLESS: {}}, "additionalProperties": False}, json.dumps({HOSTILE: 1})),
        ({"propertyNames": {"pattern": ENDLESS}}, json.dumps({HOSTILE: 1})),
    ],
)
def test_patterns_in_a_schema_end_too(impatient: None, schema: dict[str, Any], reply: str) -> None:
    with pytest.raises(InputError, match=r"grader it, row r1: checking the schema did not finish"):
        score(grader(kind="json_schema", schema=schema), reply)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"$ref": "#"}, "refers to itself without end"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself without end"),
        (
            {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"anyOf": [{"$ref": "#/$defs/x"}]}}},
            "refers to itself without end",
        ),
        ({"$schema": DRAFT_7, "definitions": {"x": {"$ref": "#/definitions/x"}}}, "itself without end"),
        ({"$ref": "https://example.com/x.json"}, "refers to 'https://example.com/x.json'"),
        ({"items": {"$ref": "other.json#/a"}}, "refers to 'other.json#/a'"),
        ({"$ref": "#/$defs/x"}, r"refers to '#/\$defs/x'"),
        ({"$ref": "#anchor"}, "refers to '#anchor'"),
        ({"$ref": "http://["}, "refers to"),
        ({"$ref": "#/enum", "enum": [1]}, "is no schema"),
        ({"format": "date-time"}, "the format 'date-time', which cannot be checked"),
        ({"items": {"format": "int32"}}, "the format 'int32', which cannot be checked"),
        ({"pattern": "("}, r"not a JSON Schema: '\(' is not a 'regex'"),
        ({"pattern": "(" * 5_000 + ")" * 5_000}, "not a JSON Schema"),
        ({"$schema": 7}, r"\$schema is not a text"),
        (nested(MOST_LEVELS + 1), "nested too deeply"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_before_it_is(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"grader it: .*{words}") as raised:
        grader(kind="json_schema", schema=schema)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    "content, words",
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"enum": ["' + b"x" * MOST_BYTES + b'"]}', "more than 1,000,000 bytes"),
        (b"\xff\xfe", "is not JSON"),
        (b"", "is not JSON"),
    ],
)
def test_a_schema_file_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"grader it: the schema file .*{words}"):
        grader(kind="json_schema", schema=str(path))


def test_a_device_is_no_schema_file() -> None:
    with pytest.raises(InputError, match="grader it: the schema file /dev/zero cannot be read"):
        grader(kind="json_schema", schema="/dev/zero")


@pytest.mark.parametrize(
    "schema, good, bad",
    [
        (
            {"properties": {"next": {"$ref": "#"}, "v": {"type": "integer"}}},
            '{"next": {"v": 1}}',
            '{"next": {"v": "1"}}',
        ),
        ({"properties": {"$ref": {"type": "string"}}}, '{"$ref": "x"}', '{"$ref": 1}'),
        ({"enum": [{"$ref": "#/nothing", "format": "x"}]}, '{"$ref": "#/nothing", "format": "x"}', "{}"),
        ({"$id": "https://e.com/a", "$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}, "{}", "[]"),
        ({"format": "date"}, '"2024-02-29"', '"2023-02-29"'),
        ({"format": "ipv4"}, '"127.0.0.1"', '"127.0.0.256"'),
        ({"format": "uuid"}, '"2eb8aa08-aa98-11ea-b4aa-73b441d16380"', '"2eb8"'),
        ({"$schema": DRAFT_7, "format": "email"}, '"a@b.c"', '"a"'),
        ({"const": {"format": "duration"}}, '{"format": "duration"}', "1"),
    ],
)
def test_schemas_that_are_as_good_as_they_look(schema: dict[str, Any], good: str, bad: str) -> None:
    it = grader(kind="json_schema", schema=schema)
    assert [score(it, good), score(it, bad)] == [1, 0]


@pytest.mark.parametrize(
    "reply", ["[" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 400 + "1" + "}" * 400, "1e999", "1" * 5_000]
)
def test_replies_that_cannot_be_checked_score_0(reply: str) -> None:
    deep = {"properties": {"a": {"$ref": "#"}}, "items": {"$ref": "#"}, "multipleOf": 0.1}
    assert score(grader(kind="json_schema", schema=deep), reply) == 0

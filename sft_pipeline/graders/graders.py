"""Graders: a reply and the expected completion in, a score out.

What holds for every kind: an empty reply scores 0 and stays in the denominator; so does one that cannot be
parsed. A reply that was cut at `max_new_tokens` is graded as it is. What the user can fix (an invalid schema,
a failing import, an exception inside a Python grader, expected completions that cannot be graded) raises
InputError naming the grader, and the row where there is one; it is never a silent 0.
"""

import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_pipeline.bounded import BoundedTask, OutOfBounds, compiled
from sft_pipeline.bounded_child import search as search_pattern
from sft_pipeline.errors import InputError
from sft_pipeline.graders.config import (
    ExactMatchGrader,
    GraderConfig,
    JsonFieldsGrader,
    JsonSchemaGrader,
    NumericAnswerGrader,
    PythonGrader,
    RegexGrader,
)
from sft_pipeline.graders.numbers_in_text import first_number_after, last_number
from sft_pipeline.json_schemas import check_schema, read_schema, valid_json
from sft_pipeline.project import project_path
from sft_pipeline.user_code import import_function

# The block that models write before an answer. One that is never closed is all thinking, and no answer.
_THINKING, _ANSWER = "<think>", "</think>"

Row = Mapping[str, Any]
"""What a Python grader is given of a row: row_id, group, prompt (text), completion (as expected)."""


@dataclass(frozen=True)
class Grader:
    """One grader, ready to score.

    Attributes:
        score: (reply, completion, row) -> score; never called with an empty reply.
        thinking: Whether it is given the thinking block with which a reply begins; else what follows it.
        expects: From a completion, why it cannot be graded against, or None where it can.
        lacks: From a completion, the fields that the grader reads and that are absent; a field that is absent
            from every completion is an error.
    """

    name: str
    score: Callable[[str, str, Row], float]
    thinking: bool = False
    expects: Callable[[str], str | None] = lambda _: None
    lacks: Callable[[str], list[str]] = lambda _: []

    def __call__(self, reply: str, completion: str, row: Row) -> float:
        """The score of one reply.

        Raises:
            InputError: A Python grader raised, or returned something that is not a finite number; or a
                pattern or a schema does not finish.
        """
        if not self.thinking and not completion.lstrip().startswith(_THINKING):
            reply = _without_thinking(reply)
        try:
            return self.score(reply, completion, row) if reply.strip() else 0.0
        except OutOfBounds as error:
            raise InputError(f"grader {self.name}, row {row.get('row_id')}: {error}") from error


def make_graders(configs: Sequence[GraderConfig]) -> list[Grader]:
    """The graders of a recipe.

    Raises:
        InputError: A schema, pattern or callable that cannot be used; the message names the grader.
    """
    return [_MAKERS[type(c)](c) for c in configs]


def check_expected(graders: Sequence[Grader], completions: Sequence[tuple[str, str]]) -> dict[str, int]:
    """How many expected completions each grader cannot grade against; those rows score 0.

    Args:
        completions: (row_id, expected completion).

    Raises:
        InputError: A grader can grade none of them, or asks for a field that none of them has: it does not
            fit this dataset, and its scores would say nothing. Or a pattern does not finish.
    """
    counts = {}
    for grader in graders:
        usable, bad = [], []
        for row_id, completion in completions:
            try:
                why = grader.expects(completion)
            except OutOfBounds as error:
                raise InputError(
                    f"grader {grader.name}, expected completion of row {row_id}: {error}"
                ) from error
            if why is None:
                usable.append(completion)
            else:
                bad.append((row_id, why))
        if bad and not usable:
            row_id, why = bad[0]
            raise InputError(
                f"grader {grader.name}: no expected completion can be graded against; row {row_id}: {why}. "
                "Fix the grader in the recipe, or use one that fits these completions"
            )
        lacking = set.intersection(*(set(grader.lacks(c)) for c in usable)) if usable else set()
        if lacking:
            raise InputError(
                f"grader {grader.name}: no expected completion has the field {sorted(lacking)[0]!r}; "
                "is it misspelt?"
            )
        counts[grader.name] = len(bad)
    return counts


# The kinds of graders.


def _json_schema(config: JsonSchemaGrader) -> Grader:
    """JSON Schema, in the draft that the schema names (2020-12 by default); `format` is checked."""
    try:
        schema = config.schema_
        if isinstance(schema, str):
            schema = read_schema(project_path(schema))
        check_schema(schema)
    except ValueError as error:
        raise InputError(f"grader {config.name}: {error}") from error
    accepts = BoundedTask(valid_json, schema)

    def score(reply: str, _completion: str, _row: Row) -> float:
        text = unfenced(reply) if config.fenced else reply
        try:
            parse_json(text)
        except Unparsable:
            return 0.0
        try:
            return float(accepts([text])[0])
        except OutOfBounds as error:
            raise OutOfBounds(
                f"checking the schema {error} on a reply of {len(text):,} characters: simplify its patterns, "
                f"in which a repeated part is repeated again like (a+)+, and its anyOf and oneOf"
            ) from error

    return Grader(config.name, score)


def _json_fields(config: JsonFieldsGrader) -> Grader:
    def expects(completion: str) -> str | None:
        try:
            parse_json(completion)
        except Unparsable as error:
            return f"the completion is not JSON ({error})"
        return None

    def lacks(completion: str) -> list[str]:
        value = parse_json(completion)
        return [f for f in config.fields if field_of(value, f) is MISSING]

    def score(reply: str, completion: str, _row: Row) -> float:
        try:
            got = parse_json(unfenced(reply) if config.fenced else reply)
            want = parse_json(completion)
        except Unparsable:
            return 0.0
        # Absent in both is agreement: fields may be optional. `lacks` catches a field that exists
        # nowhere.
        return float(all(json_equal(field_of(got, f), field_of(want, f)) for f in config.fields))

    return Grader(config.name, score, expects=expects, lacks=lacks)


def _exact_match(config: ExactMatchGrader) -> Grader:
    def normal(text: str) -> str:
        return text.strip().casefold() if config.ignore_case else text.strip()

    return Grader(config.name, lambda reply, completion, _row: float(normal(reply) == normal(completion)))


def _regex(config: RegexGrader) -> Grader:
    try:
        groups = compiled(config.pattern).groups
    except ValueError as error:
        raise InputError(f"grader {config.name}: {error}") from error
    group = config.group
    if group is not None and not 0 <= group <= groups:
        raise InputError(f"grader {config.name}: group {group} asked for, the pattern has {groups}")
    search = BoundedTask(search_pattern, config.pattern, group or 0)

    def found(text: str) -> str | None:
        try:
            match: str | None = search([text])[0]
        except OutOfBounds as error:
            raise OutOfBounds(
                f"the pattern {config.pattern!r} {error} on a text of {len(text):,} characters: write it so "
                "that no repeated part is repeated again, like a+ in (a+)+"
            ) from error
        return match

    if group is None:
        return Grader(config.name, lambda reply, _completion, _row: float(found(reply) is not None))

    def score(reply: str, completion: str, _row: Row) -> float:
        got = found(reply)
        return float(got is not None and got == found(completion))

    return Grader(
        config.name,
        score,
        expects=lambda c: None if found(c) is not None else "the pattern is not found in the completion",
    )


def _numeric_answer(config: NumericAnswerGrader) -> Grader:
    def number(text: str) -> float | None:
        return last_number(text) if config.after is None else first_number_after(text, config.after)

    def score(reply: str, completion: str, _row: Row) -> float:
        got, want = number(reply), number(completion)
        return float(got is not None and want is not None and abs(got - want) <= config.tolerance)

    where = "" if config.after is None else f" after {config.after!r}"
    return Grader(
        config.name,
        score,
        expects=lambda c: None if number(c) is not None else f"the completion has no number{where}",
    )


def _python(config: PythonGrader) -> Grader:
    function = import_function(f"grader {config.name}", config.callable)

    def score(reply: str, completion: str, row: Row) -> float:
        where = f"grader {config.name}, row {row.get('row_id')}"
        try:
            value = function(reply, completion, dict(row))
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{where}: {config.callable} raised {type(error).__name__}: {error}{_place(error)}. It is "
                f"called with a reply, the expected completion and a row ({', '.join(sorted(row))}); a reply "
                "that it cannot read should score 0"
            ) from error
        try:
            number = float(value)
        except Exception:  # also of its own __float__, or 10 ** 400
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{where}: {config.callable} returned {value!r}, not a finite number or a bool")
        return number

    return Grader(config.name, score, thinking=True)


def _place(error: BaseException) -> str:
    """Where a user's function raised."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is here
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


_MAKERS: dict[type, Callable[[Any], Grader]] = {
    JsonSchemaGrader: _json_schema,
    JsonFieldsGrader: _json_fields,
    ExactMatchGrader: _exact_match,
    RegexGrader: _regex,
    NumericAnswerGrader: _numeric_answer,
    PythonGrader: _python,
}


# Reading replies: strict JSON.


class Unparsable(ValueError):
    """The text is not JSON in the sense of RFC 8259 with unique keys."""


class _Missing:
    def __repr__(self) -> str:
        return "absent"


MISSING = _Missing()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [k for k, _ in pairs]
        raise Unparsable(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise Unparsable(f"{name} is not JSON")


def unfenced(text: str) -> str:
    """What stands inside a Markdown code fence where the whole text is one; else the text."""
    head, newline, rest = text.strip().partition("\n")
    if not newline or head.rstrip(" \t") not in ("```", "```json") or not rest.endswith("```"):
        return text
    return rest.removesuffix("```").rstrip(" \t").removesuffix("\n")


def _without_thinking(reply: str) -> str:
    before, found, rest = reply.partition(_THINKING)
    return before.rstrip() + rest.partition(_ANSWER)[2].lstrip() if found else reply


def parse_json(text: str) -> Any:
    """The value of a JSON text; surrounding white space is allowed, anything else around it is not.

    Raises:
        Unparsable: Not JSON, a repeated key, NaN or Infinity, or nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except Unparsable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unparsable(str(error) or type(error).__name__) from error


def field_of(value: Any, name: str) -> Any:
    """A field of an object by its name, or by a dotted path (`subject.id`) where no key is so named."""
    if isinstance(value, dict) and name in value:
        return value[name]
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def json_equal(a: Any, b: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0 but not true, at any depth."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(json_equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(json_equal(x, y) for x, y in zip(a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    return type(a) is type(b) and a == b

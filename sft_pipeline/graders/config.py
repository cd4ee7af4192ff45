"""The kinds of graders that a recipe may name."""

from typing import Annotated, Any, Literal

from pydantic import Field

from sft_pipeline.config.base import Config


class JsonSchemaGrader(Config):
    """1 where the reply is JSON that the schema accepts."""

    name: str
    kind: Literal["json_schema"]
    schema_: Annotated[
        dict[str, Any] | str,
        Field(alias="schema", description="a JSON Schema, or the path of a file with one"),
    ]
    fenced: Annotated[
        bool, Field(description="also read a reply that is one Markdown code fence: ```json ... ```")
    ] = False


class JsonFieldsGrader(Config):
    """1 where the named fields equal those of the expected completion, both parsed as JSON."""

    name: str
    kind: Literal["json_fields"]
    fields: Annotated[list[str], Field(min_length=1, description="names or dotted paths of fields")]
    fenced: Annotated[
        bool, Field(description="also read a reply that is one Markdown code fence: ```json ... ```")
    ] = False


class ExactMatchGrader(Config):
    """1 where reply and completion are equal once stripped."""

    name: str
    kind: Literal["exact_match"]
    ignore_case: Annotated[bool, Field(description="compare without case")] = False


class RegexGrader(Config):
    """1 where the pattern is found in the reply; with `group`, where that group equals the completion's."""

    name: str
    kind: Literal["regex"]
    pattern: Annotated[str, Field(description="regular expression of Python's re")]
    group: Annotated[
        int | None,
        Field(description="number of the group to compare; null: it is enough that the pattern is found"),
    ] = None


class NumericAnswerGrader(Config):
    """1 where the number after `after` (the last number where null) equals the completion's.

    Numbers are read as people write them: 1,234.5, 1 234, 3/4, 2½, \\frac{5}{2}, 10^6, 1 million.
    """

    name: str
    kind: Literal["numeric_answer"]
    after: Annotated[
        str | None, Field(description="text before the number, such as ####; null: the last number")
    ] = None
    tolerance: Annotated[float, Field(ge=0, description="difference that still counts as equal")] = 1e-6


class PythonGrader(Config):
    """The score of a Python callable `score(reply: str, completion: str, row: dict) -> float | bool`."""

    name: str
    kind: Literal["python"]
    callable: Annotated[str, Field(pattern=r"^[\w.]+:\w+$", description="module:function")]


GraderConfig = Annotated[
    JsonSchemaGrader | JsonFieldsGrader | ExactMatchGrader | RegexGrader | NumericAnswerGrader | PythonGrader,
    Field(discriminator="kind"),
]

"""What validated_rows reads of a dataset file: the row contract and the shape of each source's rows."""

import string
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from sft_pipeline.config.base import Config
from sft_pipeline.row_conditions import compile_condition
from sft_pipeline.stages.raw_rows.config import JoinConfig

Format = Literal[
    "auto", "messages", "prompt_completion", "instruction", "sharegpt", "dolly", "question_response", "turns"
]
Role = Literal["system", "user", "assistant", "tool"]

_TURNS = ("role", "content", "from", "value", "reasoning_content", "tools", "system")
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *_TURNS),
    "prompt_completion": ("prompt", "completion", *_TURNS),
    "instruction": ("instruction", "input", "output", "system", "history", "reasoning_content", "tools"),
    "sharegpt": ("conversations", *_TURNS),
    "dolly": ("instruction", "context", "response", "reasoning_content", "tools"),
    "question_response": ("system_prompt", "question", "response", "reasoning_content", "tools"),
    "turns": ("dialogue", "order", *_TURNS[:5]),
}
FIELDS["auto"] = tuple(sorted({field for fields in FIELDS.values() for field in fields}))
"""What `columns` may map, by format; `group` besides."""
assert set(FIELDS) == set(get_args(Format))


class ContractConfig(Config):
    """The row contract. Lengths are in characters."""

    max_reject_rate: Annotated[
        float, Field(ge=0, le=1, description="the blocking check fails above this rejected fraction")
    ] = 0.10
    require_group: Annotated[
        bool | None,
        Field(description="null: required where `columns` maps a group or the source's rows carry one"),
    ] = None
    min_prompt_chars: Annotated[int, Field(ge=0, description="characters that a prompt must have")] = 1
    max_prompt_chars: Annotated[int, Field(ge=1, description="characters that a prompt may have")] = 200_000
    min_completion_chars: Annotated[
        int, Field(ge=1, description="characters that the final reply must have")
    ] = 1
    max_completion_chars: Annotated[
        int, Field(ge=1, description="characters that the final reply may have")
    ] = 200_000

    trim_trailing_user: Annotated[
        bool,
        Field(
            description="true: turns behind the last reply are left out, instead of rejecting the row as "
            "no_final_completion"
        ),
    ] = False
    drop_leading_assistant: Annotated[
        bool, Field(description="true: replies before the first user's turn (a greeting, say) are left out")
    ] = False
    merge_consecutive: Annotated[
        bool,
        Field(
            description="true: turns of one role that follow each other become one, with a line break "
            "between them"
        ),
    ] = False

    @property
    def arranges_turns(self) -> bool:
        return self.trim_trailing_user or self.drop_leading_assistant or self.merge_consecutive


class Reshaping(Config):
    """What is done to a source's rows before their format is read, in this order."""

    where: Annotated[
        str | None,
        Field(
            description='keeps the rows for which it holds, such as reward > 0.5 and label != "spam"; '
            'Python\'s notation over columns, with len(x), lower(x), matches(x, "pattern") and '
            'column("odd name")'
        ),
    ] = None
    transform: Annotated[
        str | None,
        Field(
            pattern=r"^[\w.]+:\w+$",
            description="module:function of the project: a row (dict) -> a row, a list of rows, or None to "
            "leave it out",
        ),
    ] = None
    text: Annotated[
        dict[str, str],
        Field(
            description="column -> the text it gets, with other columns in braces, such as "
            'prompt: "Classify: {text}"'
        ),
    ] = {}
    roles: Annotated[
        dict[str, Role], Field(description="role names of the rows -> system, user, assistant or tool")
    ] = {}

    @field_validator("where")
    @classmethod
    def _understood(cls, where: str | None) -> str | None:
        if where is not None:
            compile_condition(where)
        return where

    @model_validator(mode="after")
    def _braces_pair(self) -> Self:
        for name, template in self.text.items():
            try:
                parts = list(string.Formatter().parse(template))
            except ValueError as error:
                raise ValueError(f"text.{name}: {error}; write {{{{ for a brace") from None
            if odd := [p for p in parts if p[1] == "" or p[2] or p[3]]:
                raise ValueError(
                    f"text.{name}: {{{odd[0][1]}}} is not the name of a column in braces; write {{{{ for a "
                    "brace"
                )
        return self


class SourceShape(Reshaping):
    """How the rows of one source read."""

    format: Format
    columns: dict[str, str]
    unused: list[str] = []
    join: JoinConfig | None = None


class ValidatedRowsConfig(Config):
    """Everything validated_rows depends on. `shapes[i]` is the shape of source i."""

    contract: ContractConfig
    shapes: list[SourceShape]
    time_column: str | None = None

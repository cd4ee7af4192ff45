"""What validated_rows reads of a dataset file: the row contract and the shape of each source's rows."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from sft_pipeline.config.base import Config

Format = Literal["messages", "prompt_completion", "instruction", "sharegpt", "dolly", "question_response"]

_TURNS = ("role", "content", "from", "value", "reasoning_content", "tools", "system")
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *_TURNS),
    "prompt_completion": ("prompt", "completion", *_TURNS),
    "instruction": ("instruction", "input", "output", "system", "history", "reasoning_content", "tools"),
    "sharegpt": ("conversations", *_TURNS),
    "dolly": ("instruction", "context", "response", "reasoning_content", "tools"),
    "question_response": ("system_prompt", "question", "response", "reasoning_content", "tools"),
}
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
    min_prompt_chars: Annotated[int, Field(ge=0)] = 1
    max_prompt_chars: Annotated[int, Field(ge=1)] = 200_000
    min_completion_chars: Annotated[int, Field(ge=1)] = 1
    max_completion_chars: Annotated[int, Field(ge=1)] = 200_000


class SourceShape(Config):
    """How the rows of one source read."""

    format: Format
    columns: dict[str, str]
    unused: list[str] = []


class ValidatedRowsConfig(Config):
    """Everything validated_rows depends on. `shapes[i]` is the shape of source i."""

    contract: ContractConfig
    shapes: list[SourceShape]
    time_column: str | None = None

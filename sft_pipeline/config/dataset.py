"""The dataset file."""

import difflib
from typing import Annotated, Self

from pydantic import Field, model_validator

from sft_pipeline.config.base import Config
from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.validated_rows.config import FIELDS, ContractConfig, Format, Reshaping

Name = Annotated[
    str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="letters, digits and underscores")
]


class SourceConfig(Reshaping, RawSource):
    """One source of rows."""

    format: Annotated[
        Format,
        Field(
            description="shape of the rows; auto: the one that the first rows have; turns: one turn per row, "
            "or one dialogue per file"
        ),
    ] = "prompt_completion"
    columns: Annotated[
        dict[str, str],
        Field(
            description="field of the format (or `group`) -> the source's own column; a dotted path reaches "
            "into objects and lists, for example prompt.replies.0.text"
        ),
    ] = {}

    unused: Annotated[
        list[str],
        Field(
            description="columns that nothing is to read, though they look as if they changed what is "
            "trained; `messages[].NAME` for a key of messages"
        ),
    ] = []

    @model_validator(mode="after")
    def _columns_known(self) -> Self:
        known = ("group", *FIELDS[self.format])
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"columns: the format {self.format} has no field "
                    f"{name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {', '.join(known)}"
                )
        return self


class DatasetConfig(Config):
    """A named collection of rows from one or more sources."""

    name: Name
    description: Annotated[str, Field(description="shown in Dagster, at the dataset's sensor")] = ""
    owner: Annotated[str | None, Field(description="e-mail or team:name, shown in the UI")] = None
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    contract: ContractConfig = ContractConfig()
    split: SplitConfig = SplitConfig()

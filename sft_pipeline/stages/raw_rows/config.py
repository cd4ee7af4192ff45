"""What raw_rows reads of a dataset file: its sources."""

from typing import Annotated, Literal

from pydantic import Field

from sft_pipeline.config.base import Config

Format = Literal["messages", "prompt_completion", "instruction", "sharegpt", "dolly", "question_response"]


class SourceConfig(Config):
    """One source of rows."""

    path: Annotated[str, Field(min_length=1, description="folder, file, glob, fsspec URL or hf://dataset@revision; relative to the project root")]
    format: Annotated[Format, Field(description="shape of the rows")] = "prompt_completion"
    columns: Annotated[dict[str, str], Field(description="field of the format (or `group`) -> the source's own column")] = {}
    limit: Annotated[int | None, Field(ge=1, description="take this many rows, sampled with a fixed seed")] = None
    weight: Annotated[float, Field(gt=0, description="share in the mixture: each row is repeated or sampled by this factor")] = 1.0
    static: Annotated[bool, Field(description="true: one folder or file for every snapshot")] = False


class RawRowsConfig(Config):
    """Everything raw_rows depends on."""

    sources: list[SourceConfig]

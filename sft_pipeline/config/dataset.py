"""The dataset file."""

from typing import Annotated

from pydantic import Field

from sft_pipeline.config.base import Config
from sft_pipeline.stages.grouped_split.config import SplitConfig
from sft_pipeline.stages.raw_rows.config import SourceConfig
from sft_pipeline.stages.validated_rows.config import ContractConfig

Name = Annotated[
    str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", description="letters, digits and underscores")
]


class DatasetConfig(Config):
    """A named collection of rows from one or more sources."""

    name: Name
    description: str = ""
    owner: Annotated[str | None, Field(description="e-mail or team:name, shown in the UI")] = None
    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    contract: ContractConfig = ContractConfig()
    split: SplitConfig = SplitConfig()

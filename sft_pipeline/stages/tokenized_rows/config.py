"""What tokenized_rows reads of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from sft_pipeline.config.base import Config
from sft_pipeline.text.config import TemplateConfig


class TokensConfig(Config):
    """Lengths are in tokens."""

    max_length: Annotated[int, Field(ge=8, description="tokens of a block, and of a row at most")] = 1024
    supervise: Annotated[
        Literal["completion", "assistant", "last_turn", "all"], Field(description="which tokens carry loss")
    ] = "completion"
    overflow: Annotated[
        Literal["reject", "truncate_prompt", "split", "truncate_answer"],
        Field(description="what happens to a row longer than max_length"),
    ] = "reject"
    control_tokens: Annotated[
        Literal["reject", "neutralise"],
        Field(description="what happens to a row whose text holds a control token literally"),
    ] = "reject"


class TokenizedRowsConfig(Config):
    """Everything tokenized_rows depends on; `tokenizer` is the folder or hub id whose files are read."""

    tokenizer: str
    revision: str | None
    template: TemplateConfig
    tokens: TokensConfig

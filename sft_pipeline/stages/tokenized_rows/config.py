"""What tokenized_rows reads of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from sft_pipeline.config.base import Config

NAMED_TEMPLATES = ("chatml", "llama3", "qwen", "mistral", "alpaca", "plain")
"""The templates in `templates/`; a recipe names one, the tokenizer's own, or a Jinja file."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Everything this stage reads of a tokenizer folder."""


def split_revision(name: str) -> tuple[str, str | None]:
    """ "owner/name@revision" as ("owner/name", "revision"); a name without @ has no revision."""
    base, _, revision = name.partition("@")
    return (base, revision) if revision and not name.startswith((".", "/", "~")) else (name, None)


class TemplateConfig(Config):
    """The chat template."""

    chat_template: Annotated[
        str,
        Field(
            description="`tokenizer` (the tokenizer's own), chatml, llama3, qwen, mistral, alpaca, plain, or the path of a Jinja file"
        ),
    ] = "tokenizer"
    system: Annotated[
        str | None, Field(description="a system message put before conversations that have none")
    ] = None


class TokensConfig(Config):
    """Lengths are in tokens."""

    max_length: Annotated[int, Field(ge=8)] = 1024
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

"""The recipe's template section."""

from typing import Annotated

from pydantic import Field

from sft_pipeline.config.base import Config

NAMED_TEMPLATES = ("chatml", "llama3", "qwen", "mistral", "alpaca", "plain")
"""The templates in `templates/`; a recipe names one, the tokenizer's own, or a Jinja file."""


class TemplateConfig(Config):
    """The chat template."""

    chat_template: Annotated[
        str,
        Field(
            description="`tokenizer` (the tokenizer's own), chatml, llama3, qwen, mistral, alpaca, plain, "
            "or the path of a Jinja file"
        ),
    ] = "tokenizer"
    system: Annotated[
        str | None, Field(description="a system message put before conversations that have none")
    ] = None

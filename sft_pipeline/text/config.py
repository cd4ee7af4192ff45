"""The recipe's template section."""

from typing import Annotated, Literal

from pydantic import Field

from sft_pipeline.config.base import Config

NAMED_TEMPLATES = ("chatml", "llama3", "qwen", "mistral", "alpaca", "plain")
"""The templates in `templates/`; a recipe names one, the tokenizer's own, or a Jinja file."""

IgnorableField = Literal["content", "reasoning_content", "tool_calls", "tools"]


class TemplateConfig(Config):
    """The chat template."""

    chat_template: Annotated[
        str,
        Field(
            description="`tokenizer` (the tokenizer's own), chatml, llama3, qwen, mistral, alpaca, plain, "
            "or the path of a Jinja file"
        ),
    ] = "tokenizer"
    variables: Annotated[
        dict[str, bool | int | float | str],
        Field(
            description="variables of the template, for example {enable_thinking: false}; they hold in "
            "training, in evaluation, and as the exported template's defaults"
        ),
    ] = {}
    ignore: Annotated[
        tuple[IgnorableField, ...],
        Field(
            description="fields that the template may leave out of the text; rows that have another field "
            "which it leaves out are rejected"
        ),
    ] = ()
    system: Annotated[
        str | None, Field(description="a system message put before conversations that have none")
    ] = None

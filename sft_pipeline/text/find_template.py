"""Finds a chat template: the tokenizer's own, a named one, or a Jinja file."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import jinja2

from sft_pipeline.bounded import BoundedTask, OutOfBounds
from sft_pipeline.errors import InputError
from sft_pipeline.project import project_path
from sft_pipeline.text.config import NAMED_TEMPLATES
from sft_pipeline.text.template import ChatTemplate, rendered_length
from sft_pipeline.text.tokenizer import Tokenizer

MOST_CHARACTERS = (
    1_000_000  # of a conversation of three short messages; the longest known template makes 5,000
)


def load_template(
    name: str, tokenizer: Tokenizer, variables: Mapping[str, bool | int | float | str] | None = None
) -> ChatTemplate:
    """Finds a template.

    Args:
        name: "tokenizer", one of `NAMED_TEMPLATES`, or the path of a Jinja file.
        variables: Values for variables of the template. They are written into its source as defaults, and not
            passed beside it, so that the template that is exported renders the same.

    Raises:
        InputError: There is no such template, its Jinja is wrong, or it does not end; the message says where.
    """
    if name == "tokenizer":
        text, tool_text = _own(tokenizer)
        where = f"{tokenizer.folder}: chat_template"
    elif name in NAMED_TEMPLATES:
        text = tool_text = _named(name, tokenizer)
        where = f"named template {name}"
    else:
        path = project_path(name)
        try:
            text = tool_text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            names = ", ".join(NAMED_TEMPLATES)
            raise InputError(
                f"template.chat_template {name}: neither `tokenizer`, a named template ({names}), nor a "
                f"readable Jinja file: {error}"
            ) from None
        where = str(path)
    text, tool_text = (_with_defaults(variables or {}, source) for source in (text, tool_text))
    if name not in NAMED_TEMPLATES:
        _check_bounds(where, text, tool_text, tuple(tokenizer.special.items()))
    try:
        template = ChatTemplate(name, text, tool_text, dict(tokenizer.special))
        return ChatTemplate(name, text, tool_text, dict(tokenizer.special), _find_stop(template, tokenizer))
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{where}, line {error.lineno}: {error.message}") from None


def _own(tokenizer: Tokenizer) -> tuple[str, str]:
    """The tokenizer's own (default template, template for rows with tools)."""
    found = tokenizer.templates
    if not found:
        raise InputError(
            f"tokenizer {tokenizer.source} has no chat template: set template.chat_template to one of "
            f"{', '.join(NAMED_TEMPLATES)}, or to a Jinja file"
        )
    if "default" not in found:
        raise InputError(
            f"tokenizer {tokenizer.source} has the chat templates {', '.join(found)} and no default: copy "
            "the one you mean to a Jinja file"
        )
    return found["default"], found.get("tool_use", found["default"])


def _named(name: str, tokenizer: Tokenizer) -> str:
    """A named template's source with the tokenizer's own eos (and bos, where it adds one) written into it.

    Written in, and not passed as variables, so that the text exported beside a model renders alike
    everywhere.
    """
    eos = tokenizer.special.get("eos_token")
    if eos is None or tokenizer.backend.token_to_id(eos) is None:
        raise InputError(
            f"tokenizer {tokenizer.source} names no eos_token, which the named template {name} needs to end "
            "turns"
        )
    bos = tokenizer.special["bos_token"] if tokenizer.adds_bos else ""
    body = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    values = {"bos": bos, "eos": eos}
    head = [f"{{%- set {k} = {json.dumps(v, ensure_ascii=False)} -%}}\n" for k, v in values.items()]
    return "".join([*head, body])


@lru_cache(maxsize=16)
def _check_bounds(where: str, text: str, tool_text: str, special: tuple[tuple[str, str], ...]) -> None:
    """Renders short conversations in a process of its own, before any is rendered here.

    A loop without end or a text that fills the memory shows there, unless it depends on what a row says.

    Raises:
        InputError: The template does not end within its bounds.
    """
    system, user = {"role": "system", "content": "Rules"}, {"role": "user", "content": "What is asked"}
    answer = {"role": "assistant", "content": "What is answered"}
    function = {"name": "probe", "description": "It probes.", "parameters": {"type": "object"}}
    render = BoundedTask(rendered_length, text, tool_text, dict(special))
    try:
        for messages in ([user, answer], [system, user, answer]):
            for tools in (None, [{"type": "function", "function": function}]):
                length = render([json.dumps({"messages": messages, "tools": tools})])[0]
                if length > MOST_CHARACTERS:
                    raise OutOfBounds(f"gave {length:,} characters")
    except OutOfBounds as error:
        raise InputError(
            f"{where}: rendering a few short messages {error}; look for loops in the template"
        ) from None


def end_ids(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """The ids at which a reply ends, ascending."""
    stop = tokenizer.ids(template.stop) if template.stop else []
    ends = {*(stop if len(stop) == 1 else ()), tokenizer.id_of("eos_token"), *tokenizer.generation_eos}
    return sorted(i for i in ends if i is not None)


def _with_defaults(variables: Mapping[str, bool | int | float | str], source: str) -> str:
    """The source, with values for variables that nobody passes.

    They stand on lines of their own, of which nothing is left in the text (trim_blocks), and the source still
    begins a line (lstrip_blocks).
    """
    lines = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {_jinja_literal(value)} %}}{{% endif %}}\n"
        for name, value in sorted(variables.items())
    ]
    return "".join([*lines, source])


def _jinja_literal(value: bool | int | float | str) -> str:
    return json.dumps(value, ensure_ascii=False)  # true, 1.5 and "text" are the same in Jinja


def _find_stop(template: ChatTemplate, tokenizer: Tokenizer) -> str | None:
    """What ends an assistant's turn when it is generated; None where nothing does.

    Of the control tokens behind the answer, those that stand there also when another message follows: what
    some templates put behind the whole conversation ends no turn. Of these the first that ends generation, or
    else the last: Command A closes the reply, and then the turn.
    """
    answer = "What is answered"
    turns = [{"role": "user", "content": "What is asked"}, {"role": "assistant", "content": answer}]
    more = {"role": "user", "content": "What else"}
    for messages in (turns, [{"role": "system", "content": "Rules"}, *turns]):  # some templates need a system
        try:
            rest = template.render(messages).rpartition(answer)[2]
        except jinja2.TemplateSyntaxError:
            raise
        except jinja2.TemplateError:
            continue
        found = list(tokenizer.control_pattern.finditer(rest))
        if not found:
            return rest.strip() or None
        try:
            followed = template.render([*messages, more]).rpartition(answer)[2]
        except jinja2.TemplateError:
            followed = rest
        also = tokenizer.control_pattern.findall(followed)
        ends = [m for m, other in zip(found, also, strict=False) if m.group() == other] or found[:1]
        ids = {tokenizer.id_of("eos_token"), *tokenizer.generation_eos}
        return next((m for m in ends if tokenizer.control[m.group()] in ids), ends[-1]).group()
    return None

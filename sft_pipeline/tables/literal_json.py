"""JSON read and written without changing what was written: the order of keys, and the spelling of numbers.

Python reads 1.50 as 1.5 and 1e3 as 1000.0. Where the spelling matters, because a model is to learn it, such
a number becomes a `LiteralFloat` or `LiteralInt`, which is the number and remembers its text.
"""

import json
from typing import Any

# A Unicode noncharacter: it stands for nothing in any text, and marks where a number's spelling belongs.
_MARK = "\ufdd3"


class LiteralFloat(float):
    """A number that Python would spell otherwise."""

    literal: str


class LiteralInt(int):
    """A whole number that Python would spell otherwise: -0."""

    literal: str


def loads(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deep.
    """
    return json.loads(text, parse_float=_float, parse_int=_int)


def dumps(value: Any, **options: Any) -> str:
    """JSON text in which `LiteralFloat` and `LiteralInt` stand as they were read.

    Args:
        options: Of `json.dumps`.
    """
    literals: list[str] = []
    marked = _marked(value, literals)
    text = json.dumps(marked, **options)
    if literals:
        begin = json.dumps(_MARK, ensure_ascii=options.get("ensure_ascii", True))[:-1]
        for i, literal in enumerate(literals):
            text = text.replace(f'{begin}{i}"', literal)
    return text


def _float(text: str) -> float:
    value = float(text)
    if repr(value) == text:
        return value
    found = LiteralFloat(value)
    found.literal = text
    return found


def _int(text: str) -> int:
    value = int(text)
    if text != "-0":
        return value
    found = LiteralInt(value)
    found.literal = text
    return found


def _marked(value: Any, literals: list[str]) -> Any:
    """The value with a marked text in place of each number that Python would spell otherwise."""
    if isinstance(value, LiteralFloat | LiteralInt):
        literals.append(value.literal)
        return f"{_MARK}{len(literals) - 1}"
    if isinstance(value, dict):
        return {k: _marked(v, literals) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(v, literals) for v in value]
    return value

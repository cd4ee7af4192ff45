"""Conditions on the columns of a row, such as `reward > 0.5 and label not in ["spam", "ads"]`.

An expression is Python's notation, and only this of it: columns by name (`meta.score` reaches inside,
`column("odd name")` takes any name), texts, numbers, `true`, `false`, `null`, lists of these, `== != < <= >
>= in not in`, `and or not`, parentheses, `len(x)`, `lower(x)`, and `matches(x, "pattern")` with a pattern of
RE2 (https://github.com/google/re2/wiki/Syntax), whose time is linear. Nothing of it is executed as code.

A column that a row does not have is null. Null equals null only, is less or greater than nothing, and holds
nothing. Text that spells a number is compared with numbers as that number: every value of a CSV file is text.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Value = Callable[[Row], Any]

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_WORDS = {"true": True, "false": False, "null": None}
MOST_CHARACTERS = 2_000


class ConditionFailed(Exception):
    """A row's values do not fit the condition; the message says which and why."""


def compile_condition(text: str) -> Callable[[Row], bool]:
    """The condition as a function of a row, which may raise ConditionFailed.

    Raises:
        ValueError: The text is no such expression; the message says what is not understood.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"longer than {MOST_CHARACTERS:,} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an expression ({getattr(error, 'msg', error)}): {text}") from None
    value = _value(tree.body)

    def holds(row: Row) -> bool:
        found = value(row)
        if found is None:
            return False
        if not isinstance(found, bool):
            raise ConditionFailed(f"{text} gives {found!r}, neither true nor false")
        return found

    return holds


def columns_of(text: str) -> set[str]:
    """The columns that a condition reads.

    Raises:
        ValueError: As `compile_condition`.
    """
    compile_condition(text)
    tree = ast.parse(text.strip(), mode="eval")
    inside = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    functions = {id(call.func) for call in calls}
    found = {
        _path(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inside | functions
    }
    for call in calls:
        match call.func, call.args:
            case ast.Name(id="column"), [ast.Constant(value=str() as name)]:
                found.add(name)
    return found - _WORDS.keys()


def column_value(row: Row, name: str, absent: Any = None) -> Any:
    """A column by its name, else by a dotted path into objects and lists; `absent` where there is neither."""
    if name in row:
        return row[name]
    if "." not in name:
        return absent
    value: Any = row
    for key in name.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return absent
    return value


def _value(node: ast.expr) -> Value:
    match node:
        case ast.Constant(value=str() | int() | float() | None as constant):
            return lambda row: constant
        case ast.Name(id=name) if name in _WORDS:
            word = _WORDS[name]
            return lambda row: word
        case ast.Name() | ast.Attribute():
            path = _path(node)
            return lambda row: column_value(row, path)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda row: -number
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _value(operand)
            return lambda row: not inner(row)
        case ast.BoolOp(op=op, values=values):
            parts, every = [_value(v) for v in values], isinstance(op, ast.And)
            return lambda row: (all if every else any)(bool(part(row)) for part in parts)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            items = [_value(e) for e in elements]
            return lambda row: [item(row) for item in items]
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_value(e) for e in (left, *others)]
            return lambda row: all(
                _compare(op, a(row), b(row)) for op, a, b in zip(ops, sides, sides[1:], strict=False)
            )
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _call(name, arguments)
    raise ValueError(f"not understood: {ast.unparse(node)}")


def _path(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_path(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(f"not the name of a column: {ast.unparse(node)}")


def _call(name: str, arguments: list[ast.expr]) -> Value:
    match name, arguments:
        case "column", [ast.Constant(value=str() as path)]:
            return lambda row: column_value(row, path)
        case "len", [argument]:
            inner = _value(argument)
            return lambda row: _length(inner(row))
        case "lower", [argument]:
            inner = _value(argument)
            return lambda row: found.lower() if isinstance(found := inner(row), str) else found
        case "matches", [argument, ast.Constant(value=str() as pattern)]:
            return _matches(_value(argument), pattern)
    raise ValueError(
        f'not understood: {name}(…); known are column("name"), len(x), lower(x), matches(x, "pattern")'
    )


def _matches(inner: Value, pattern: str) -> Value:
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        pc.match_substring_regex(pa.scalar(""), pattern)
    except pa.ArrowInvalid as error:
        raise ValueError(f"not a pattern of RE2: {error}") from None

    def found(row: Row) -> bool:
        text = inner(row)
        return isinstance(text, str) and pc.match_substring_regex(pa.scalar(text), pattern).as_py()

    return found


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, str | list | Mapping) else None


def _compare(op: ast.cmpop, a: Any, b: Any) -> bool:
    if isinstance(op, ast.Eq | ast.Is):
        return _equal(a, b)
    if isinstance(op, ast.NotEq | ast.IsNot):
        return not _equal(a, b)
    if isinstance(op, ast.In | ast.NotIn):
        return _contains(b, a) is isinstance(op, ast.In)
    if a is None or b is None:
        return False
    x, y = _alike(a, b)
    if isinstance(x, str) is not isinstance(y, str) or not isinstance(x, str | int | float):
        raise ConditionFailed(f"{a!r} and {b!r} cannot be compared")
    return _ORDER[type(op)](x, y)


def _equal(a: Any, b: Any) -> bool:
    x, y = _alike(a, b)
    return isinstance(x, bool) is isinstance(y, bool) and bool(x == y)


def _contains(whole: Any, part: Any) -> bool:
    if isinstance(whole, str):
        return isinstance(part, str) and part in whole
    if isinstance(whole, Mapping):
        return part in whole
    return isinstance(whole, list) and any(_equal(part, each) for each in whole)


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Both as numbers (or truth values) where one of them is, and the other is text that spells one."""
    if isinstance(a, str) and not isinstance(b, str):
        return _as(type(b), a), b
    if isinstance(b, str) and not isinstance(a, str):
        return a, _as(type(a), b)
    return a, b


def _as(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    if kind in (int, float):
        try:
            return float(text)
        except ValueError:
            return text
    return text

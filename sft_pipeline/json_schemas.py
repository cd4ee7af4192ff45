"""JSON Schemas that a recipe gives: read, checked, and made into validators that download nothing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 1_000_000  # of a schema's file
MOST_LEVELS = 100
# What jsonschema checks with the standard library alone. Whether it checks more would depend on what else is
# installed, and a score must not.
FORMATS = frozenset({"date", "email", "idn-email", "ip-address", "ipv4", "ipv6", "regex", "time", "uuid"})
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_SAME_PLACE = (
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "dependentSchemas",
    "dependencies",
    "extends",
)
"""Keywords whose schemas look at the same value as the schema that they are in."""


def read_schema(path: Path) -> Any:
    """The schema in a file.

    Raises:
        ValueError: It cannot be read, is too large, or is not JSON.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"the schema file {path} cannot be read (not a file)")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"the schema file {path} cannot be read ({error.strerror})") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"the schema file {path} has more than {MOST_BYTES:,} bytes: is it a schema?")
    try:
        return json.loads(content.decode())
    except RecursionError as error:
        raise ValueError(
            f"the schema file {path} is nested too deeply: at most {MOST_LEVELS} levels"
        ) from error
    except ValueError as error:
        raise ValueError(f"the schema file {path} is not JSON: {error}") from error


def check_schema(schema: Any) -> None:
    """Finds what would only show once there are values to check: nothing of it may surprise after a training.

    Raises:
        ValueError: It is not a JSON Schema, refers to what is not in it or to itself without end, or asks for
            a format that cannot be checked.
    """
    import jsonschema

    _check_depth(schema)
    kind = _kind(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON Schema: {error.message:.300} (at {error.json_path})") from error
    except RecursionError as error:
        raise ValueError("not a JSON Schema: a pattern in it is nested too deeply") from error
    _check_parts(schema, kind)


def validator(schema: Any) -> Any:
    """A jsonschema validator, in the draft that the schema names (2020-12 by default)."""
    import jsonschema
    import referencing

    kind = _kind(schema)
    formats = jsonschema.FormatChecker(())
    formats.checkers = _formats(kind)
    # An empty registry: a `$ref` to elsewhere is never a download.
    return kind(schema, registry=referencing.Registry(), format_checker=formats)


def valid_json(schema: Any) -> Callable[[str], bool]:
    """Whether a schema that `check_schema` lets pass accepts a JSON text; a task of `bounded_child`."""
    is_valid = validator(schema).is_valid

    def accepts(text: str) -> bool:
        try:
            return bool(is_valid(json.loads(text)))
        except (RecursionError, ArithmeticError):  # a value nested too deeply to be checked, or 1e999
            return False

    return accepts


def _kind(schema: Any) -> Any:
    import jsonschema

    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        raise ValueError("not a JSON Schema: $schema is not a text")
    return jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)


def _formats(kind: Any) -> dict[str, Any]:
    return {name: check for name, check in kind.FORMAT_CHECKER.checkers.items() if name in FORMATS}


def _check_depth(schema: Any) -> None:
    level = [schema]
    for _ in range(MOST_LEVELS + 1):
        inner = [part for part in level if isinstance(part, dict | list)]
        level = [each for part in inner for each in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return
    raise ValueError(f"the schema is nested too deeply: at most {MOST_LEVELS} levels")


def _check_parts(schema: Any, kind: Any) -> None:
    """Looks at every schema in the schema, and at every one that is referred to."""
    from referencing import Registry
    from referencing import jsonschema as drafts

    draft = drafts.specification_with(kind.META_SCHEMA.get("$schema", ""), default=drafts.DRAFT202012)
    root = draft.create_resource(schema)
    known = _formats(kind)
    waiting = [(schema, Registry().resolver_with_root(root))]
    targets: dict[int, list[tuple[str, Any]]] = {}  # by id, the schemas that look at the same value
    while waiting:
        part, resolver = waiting.pop()
        if id(part) in targets or not isinstance(part, dict):
            continue
        name = part.get("format")
        if isinstance(name, str) and name not in known:
            raise ValueError(
                f"the schema asks for the format {name!r}, which cannot be checked here: leave it out, or "
                f"write a `pattern`. Checked are {', '.join(sorted(known))}"
            )
        targets[id(part)] = [("", each) for each in _same_place(part)]
        for keyword in _REFERENCES:
            if isinstance(reference := part.get(keyword), str):
                found = _look_up(resolver, reference)
                targets[id(part)].append((reference, found.contents))
                waiting.append((found.contents, found.resolver))
        for each in draft.create_resource(part).subresources():
            waiting.append((each.contents, resolver.in_subresource(each)))
    _refuse_circles(schema, targets)


def _same_place(part: dict[str, Any]) -> Iterator[Any]:
    for keyword in _SAME_PLACE:
        value = part.get(keyword)
        if keyword in ("dependentSchemas", "dependencies") and isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list):
            yield from value
        else:
            yield value


def _look_up(resolver: Any, reference: str) -> Any:
    from referencing.exceptions import Unresolvable

    try:
        found = resolver.lookup(reference)
    except (Unresolvable, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"the schema refers to {reference!r}, which is not inside it, and nothing is downloaded: put it "
            "under $defs"
        ) from error
    if not isinstance(found.contents, dict | bool):
        raise ValueError(f"the schema refers to {reference!r}, which is no schema")
    return found


def _refuse_circles(schema: Any, targets: dict[int, list[tuple[str, Any]]]) -> None:
    """Refuses references that come back to where they were without having gone into the value."""
    finished: set[int] = set()
    for start in targets:
        path, inside = [(start, iter(targets[start]))], {start}
        while path and start not in finished:
            here, rest = path[-1]
            for reference, target in rest:
                if id(target) in inside:
                    raise ValueError(
                        f"the schema refers to itself without end ({reference or '$ref'}): a schema may use "
                        "itself for a part of the value, not for the same value"
                    )
                if id(target) in targets and id(target) not in finished:
                    path.append((id(target), iter(targets[id(target)])))
                    inside.add(id(target))
                    break
            else:
                path.pop()
                inside.discard(here)
                finished.add(here)

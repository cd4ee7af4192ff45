"""YAML with line numbers: values as plain Python, and for every key the file and line it came from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_pipeline.errors import InputError

Loc = tuple[str | int, ...]
MOST_BYTES = 1_000_000  # of a file
MOST_VALUES = 100_000  # of a file, its aliases written out: a few lines of them can stand for millions


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and a 1-based line, or a command-line option."""

    where: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.where}:{self.line}" if self.line else self.where


@dataclass
class Document:
    """A mapping, and the origin of each of its (nested) keys and list items."""

    value: dict[str, Any]
    origins: dict[Loc, Origin]

    def origin(self, loc: Loc) -> Origin:
        """The origin of a location, or of the nearest enclosing one that has any."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.origins:
                return self.origins[loc[:end]]
        return Origin("?")


def read_yaml(path: Path) -> Document:
    """Reads one file that holds one mapping.

    Raises:
        InputError: The file cannot be read, is not YAML, repeats a key, or is not a mapping; with path and
            line.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read {path}: it is not a file")
        with path.open("rb") as stream:
            found = stream.read(MOST_BYTES + 1)
        if len(found) > MOST_BYTES:
            raise InputError(
                f"{path}: the file has more than {MOST_BYTES:,} bytes, which no configuration needs: rows "
                "belong into a data file"
            )
        content = found.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
        if node is None:
            raise InputError(f"{path}:1: the file is empty")
        if not isinstance(node, yaml.MappingNode):
            kind = type(node).__name__.removesuffix("Node").lower()
            line = node.start_mark.line + 1
            raise InputError(f"{path}:{line}: expected `key: value` lines, found a {kind}")
        if (count := _values(node, {})) > MOST_VALUES:
            raise InputError(
                f"{path}: with what its aliases stand for, it has {count:,} values; at most "
                f"{MOST_VALUES:,} are read"
            )
        origins: dict[Loc, Origin] = {(): Origin(str(path), 1)}
        _collect(node, (), str(path), origins)
        return Document(yaml.safe_load(content), origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(
            f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem or error.context}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be read") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: not valid YAML: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values below a node, with every alias written out, but each node visited once.

    Raises:
        ValueError: A node contains itself.
    """
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise ValueError(f"line {node.start_mark.line + 1} contains itself")
        return found
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_values(child, known) for child in children)
    known[id(node)] = total
    return total


def _collect(node: yaml.Node, loc: Loc, where: str, origins: dict[Loc, Origin]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise InputError(f"{where}:{line}: the key {key!r} is given twice")
            seen.add(key)
            origins[(*loc, key)] = Origin(where, line)
            _collect(value_node, (*loc, key), where, origins)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*loc, index)] = Origin(where, item.start_mark.line + 1)
            _collect(item, (*loc, index), where, origins)


def overlay(base: Document, top: Document) -> Document:
    """`top` over `base`: mappings merge key by key, anything else replaces."""
    return Document(_merge(base.value, top.value), {**base.origins, **top.origins})


def _merge(base: Any, top: Any) -> Any:
    if isinstance(base, dict) and isinstance(top, dict):
        return {**base, **{k: _merge(base[k], v) if k in base else v for k, v in top.items()}}
    return top


def parse_set(option: str) -> Document:
    """A `--set a.b=value` option; the value is YAML.

    Raises:
        InputError: It is not of that form.
    """
    path, equals, raw = option.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {option}: write it as a.b=value")
    try:
        node = yaml.compose(raw, Loader=yaml.SafeLoader)
        if node is not None and (count := _values(node, {})) > MOST_VALUES:
            raise ValueError(f"its aliases stand for {count:,} values; at most {MOST_VALUES:,} are read")
        value = yaml.safe_load(raw)
    except RecursionError as error:
        raise InputError(f"--set {option[:200]}: the value is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {option[:200]}: the value is not valid YAML: {_one_line(error)}") from error
    # YAML 1.1 reads 1e-4 as text; people mean the number.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            pass
    origin = Origin(f"--set {option}")
    origins: dict[Loc, Origin] = {tuple(keys[: i + 1]): origin for i in range(len(keys))}
    for key in reversed(keys):
        value = {key: value}
    return Document(value, origins)

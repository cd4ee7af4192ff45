"""Python functions of the user (graders, transforms): how they are imported, and which files they are of."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file
from sft_pipeline.project import project_root


def import_function(what: str, name: str) -> Callable[..., Any]:
    """The function `module:function`.

    Args:
        what: Who wants it, for messages: "grader exact".

    Raises:
        InputError: It cannot be imported, or is no function.
    """
    module_name, _, function_name = name.partition(":")
    root = str(project_root())
    # Process-wide, and on purpose: what the function imports of the project must be found too.
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{what}: {name} cannot be imported ({type(error).__name__}: {error}); modules are looked for in "
            f"the project root {root} and among the installed packages"
        ) from error
    if not callable(function):
        raise InputError(f"{what}: {name} is not callable")
    return function


def digest_function(what: str, name: str) -> dict[str, str]:
    """{source file: SHA-256} of everything that `function_sources` finds.

    Raises:
        InputError: There is no such module.
    """
    return {key: digest_file(path) for key, path in function_sources(what, name).items()}


def function_sources(what: str, name: str) -> dict[str, Path]:
    """The source files of a function: its module, and the modules of the project root that it imports.

    Returns:
        {path relative to the project root, or the module's name where it is an installed package: file}

    Raises:
        InputError: There is no such module.
    """
    module = name.partition(":")[0]
    root = project_root()
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        each = todo.pop()
        path = _module_file(root, each)
        if path is not None and (key := path.relative_to(root).as_posix()) not in found:
            found[key] = path
            todo += _imported(path, each)
    if not found:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError) as error:
            raise InputError(f"{what}: {module} cannot be imported ({error})") from error
        if spec is None:
            raise InputError(
                f"{what}: there is no module {module} in the project root {root} or among the installed "
                "packages"
            )
        if spec.origin and Path(spec.origin).is_file():
            found[module] = Path(spec.origin)
    return found


def _module_file(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


def _imported(path: Path, name: str) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}") from error
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            found += [start, *(f"{start}.{a.name}" for a in node.names)]
    return [f for f in found if f and not f.startswith("sft_pipeline.")]

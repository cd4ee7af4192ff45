"""The files outside the store that graders read: JSON schemas, and the sources of Python graders."""

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file
from sft_pipeline.graders.config import GraderConfig, JsonSchemaGrader, PythonGrader
from sft_pipeline.project import project_path, project_root


def digest_graders(graders: Sequence[GraderConfig]) -> dict[str, str]:
    """{file: SHA-256} of everything that graders read from outside.

    Raises:
        InputError: A file or module is not there; the message names the grader.
    """
    found = {}
    for grader in graders:
        if isinstance(grader, JsonSchemaGrader) and isinstance(grader.schema_, str):
            found[grader.schema_] = _digest(grader.name, project_path(grader.schema_))
        elif isinstance(grader, PythonGrader):
            for name, path in grader_sources(grader).items():
                found[name] = _digest(grader.name, path)
    return found


def _digest(grader: str, path: Path) -> str:
    if not path.is_file():
        raise InputError(
            f"grader {grader}: {path} does not exist (relative paths start at the folder of dagster.yaml)"
        )
    return digest_file(path)


def grader_sources(grader: PythonGrader) -> dict[str, Path]:
    """The source files of a Python grader: its module, and the modules of the project root that it imports.

    Returns:
        {path relative to the project root, or the module's name where it is an installed package: file}

    Raises:
        InputError: There is no such module.
    """
    module = grader.callable.partition(":")[0]
    root = project_root()
    found: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        path = _module_file(root, name)
        if path is not None and (key := path.relative_to(root).as_posix()) not in found:
            found[key] = path
            todo += _imported(path, name)
    if not found:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError) as error:
            raise InputError(f"grader {grader.name}: {module} cannot be imported ({error})") from error
        if spec is None:
            raise InputError(
                f"grader {grader.name}: there is no module {module} in the project root {root} "
                "or among the installed packages"
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

"""Rules for the whole package: imports point one way, class names are unique, no file or line is too long."""

import ast
import subprocess
import sys
from collections import defaultdict

import pytest

from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.stages.code_version import imported_modules, parse, read_sources
from sft_pipeline.stages.graph import STAGES
from sft_pipeline_tests.command import ROOT

SOURCES = {name: s for name, s in read_sources(PACKAGE_DIR).items() if not name.endswith(".jinja")}
MODULES = {name: parse(name, source) for name, source in SOURCES.items()}
IMPORTS = {name: imported_modules(module, MODULES) for name, module in MODULES.items()}
MOST_LINES = 400


def stage_of(module: str) -> str:
    """The stage whose package a module is in; empty where it is in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "stages" and parts[1] in STAGES else ""


def circles() -> list[str]:
    """One circle of imports for each module that closes one, also where an import is inside a function."""
    found: list[str] = []
    finished: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in finished:
            path.append(name)
            for other in sorted(IMPORTS[name]):
                visit(other)
            path.pop()
            finished.add(name)

    for name in sorted(IMPORTS):
        visit(name)
    return found


def test_no_imports_go_in_a_circle() -> None:
    assert circles() == []


def test_imports_are_absolute() -> None:
    relative = [
        name
        for name, source in SOURCES.items()
        if any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(ast.parse(source)))
    ]
    assert relative == []


def test_no_stage_imports_the_inside_of_another() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, imports in IMPORTS.items()
        for other in sorted(imports)
        if stage_of(name) and stage_of(other) not in ("", stage_of(name)) and not other.endswith(".config")
    ]
    assert wrong == []


def test_shared_ground_imports_nothing_of_the_stages() -> None:
    shared = ("text.", "graders.", "training.", "tables.", "store.", "hub", "external_files")
    wrong = [
        f"{name} imports {other}"
        for name, imports in IMPORTS.items()
        for other in sorted(imports)
        if name.startswith(shared) and other.startswith("stages.") and other != "stages.workers"
    ]
    assert wrong == []


def test_configurations_import_configurations_only() -> None:
    allowed = {"bounded", "config.base", "errors", "hub", "json_schemas", "project", "row_conditions"}
    wrong = [
        f"{name} imports {other}"
        for name, imports in IMPORTS.items()
        for other in sorted(imports)
        if name.endswith(".config") and other not in allowed and not other.endswith(".config")
    ]
    assert wrong == []


def test_the_names_of_classes_are_unique() -> None:
    found = defaultdict(list)
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(name)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_format_exceptions() -> None:
    skips = [name for name, source in SOURCES.items() if b"# fmt: skip" in source or b"# fmt: off" in source]
    assert skips == []


@pytest.mark.parametrize("folder", ["sft_pipeline", "sft_pipeline_tests", "bench"])
def test_lines_are_within_the_configured_columns(folder: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--select", "E501", "--output-format", "concise", folder]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_loading_the_stages_imports_no_heavy_library() -> None:
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "mlflow", "pyarrow", "matplotlib", "dagster"}
    code = f"import sft_pipeline.stages.graph, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

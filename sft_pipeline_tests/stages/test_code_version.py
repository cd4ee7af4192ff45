"""What changes a stage's code version and what does not, tried on every file of the package."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.stages.code_version import Module, counted, parse, read_sources, version_of
from sft_pipeline.stages.graph import STAGES

SOURCES = read_sources(PACKAGE_DIR)
PYTHON = {name: source for name, source in SOURCES.items() if not name.endswith(".jinja")}


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return {name: parse(name, source) for name, source in SOURCES.items()}


def changed_stages(modules: dict[str, Module], name: str, source: bytes) -> set[str]:
    """The stages whose code version an edited file changes."""
    edited = modules | {name: parse(name, source)}
    return {s for s in STAGES if version_of(s, edited) != version_of(s, modules)}


def with_other_docstrings(source: bytes) -> bytes:
    """The source with every docstring replaced."""
    lines = source.decode().splitlines()
    documented = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    for text in sorted(documented, key=lambda node: -node.lineno):  # from the end, so that line numbers hold
        before = lines[text.lineno - 1][: text.col_offset]
        lines[text.lineno - 1 : text.end_lineno] = [f'{before}"""Other words."""']
    return "\n".join(lines).encode()


def with_another_constant(source: bytes) -> bytes:
    """The source with its first number or text that is no docstring replaced by another value."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) in (int, str) and id(node) not in docstrings
    )
    found.value = found.value + (1 if isinstance(found.value, int) else "x")
    return ast.unparse(tree).encode()


@pytest.mark.parametrize(
    "edit", [lambda source: source + b"\n# A remark.\n", with_other_docstrings], ids=["comment", "docstrings"]
)
def test_comments_and_docstrings_of_no_file_count(
    edit: Callable[[bytes], bytes], modules: dict[str, Module]
) -> None:
    different = [name for name, source in PYTHON.items() if parse(name, edit(source)) != modules[name]]
    assert different == []


def test_code_of_every_file_counts_for_the_stages_that_are_made_of_it_and_for_no_other(
    modules: dict[str, Module],
) -> None:
    made_of = {stage: counted(stage, modules) for stage in STAGES}
    for name, source in PYTHON.items():
        expected = {stage for stage in STAGES if name in made_of[stage]}
        assert changed_stages(modules, name, source + b"\nADDED = 1\n") == expected, name


def test_every_module_of_a_stage_counts_but_for_reports_diagnoses_and_its_declaration(
    modules: dict[str, Module],
) -> None:
    left_out = ("asset", "report", "diagnosis")
    for stage in STAGES:
        inside = {name for name in modules if name.startswith(f"stages.{stage}.")}
        expected = {name for name in inside if name.rpartition(".")[2] not in left_out}
        assert counted(stage, modules) & inside == expected
        assert f"stages.{stage}.build" in expected


def test_a_constant_of_the_mask_changes_tokenized_rows(modules: dict[str, Module]) -> None:
    name = "stages.tokenized_rows.mask"
    assert changed_stages(modules, name, with_another_constant(PYTHON[name])) == {"tokenized_rows"}


def test_the_loss_counts_where_models_are_trained(modules: dict[str, Module]) -> None:
    changed = changed_stages(modules, "training.loss", with_another_constant(PYTHON["training.loss"]))
    assert changed >= {"sanity_check", "trained_checkpoints"}
    assert not changed & {"raw_rows", "validated_rows", "grouped_split", "tokenized_rows", "packed_shards"}


def test_plots_reports_diagnoses_and_plumbing_count_nowhere(modules: dict[str, Module]) -> None:
    everything = set().union(*(counted(stage, modules) for stage in STAGES))
    uncounted = ("plots", "reporting", "tracking", "launch", "lineage", "store", "orchestration", "cli")
    assert not [name for name in everything if name.split(".")[0] in uncounted]
    assert not [name for name in everything if name.rpartition(".")[2] in ("report", "diagnosis")]
    assert {name for name in modules if name.startswith("plots.")}


def test_a_template_counts_where_rows_are_rendered(modules: dict[str, Module]) -> None:
    name = "text/templates/chatml.jinja"
    changed = changed_stages(modules, name, SOURCES[name] + b" ")
    assert "tokenized_rows" in changed and not changed & {"raw_rows", "grouped_split"}


def test_layout_log_lines_and_descriptions_do_not_count_and_what_is_done_does() -> None:
    plain = b"def f(report, x):\n    report.log(f'{x} rows')\n    return g(x, description='words', limit=3)\n"
    same = (
        b"def f(report, x):\n    return g(\n        x,\n        description=f'other {x}', limit=3,\n    )\n"
    )
    assert parse("m", plain).digest == parse("m", same).digest
    for other in (b"limit=4", b"maximum=3"):
        assert parse("m", plain.replace(b"limit=3", other)).digest != parse("m", plain).digest
    assert parse("m", plain.replace(b"report.log", b"report.write")).digest != parse("m", plain).digest


def test_imports_inside_functions_are_found() -> None:
    source = b"def f():\n    from sft_pipeline.training import loss\n    import sft_pipeline.text.reply\n"
    assert parse("m", source).imports == ("text.reply", "training.loss")


def test_the_cached_digests_are_those_of_the_files(home: Path) -> None:
    code = "from sft_pipeline.stages.code_version import code_version; print(code_version('packed_shards'))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)  # parsed, then from the cache
    }
    assert (home / "code_digests.json").is_file()
    modules = {name: parse(name, source) for name, source in read_sources(PACKAGE_DIR).items()}
    assert printed == {version_of("packed_shards", modules)}

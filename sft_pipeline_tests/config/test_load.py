"""Dataset and recipe files: what loads, and how each mistake is told."""

import os
from pathlib import Path

import pytest

from sft_pipeline.config.load import find_recipe, load_catalog
from sft_pipeline.config.schemas import schemas
from sft_pipeline.config.yaml_lines import parse_set, read_yaml
from sft_pipeline.errors import InputError
from sft_pipeline.project import NO_TELEMETRY, PACKAGE_DIR, set_environment

DATASET = "name: d\nsources:\n  - path: rows\n"
RECIPE = "name: {name}\ndataset: d\nmodel:\n  base: m\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "datasets").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "datasets" / "d.yaml").write_text(DATASET)
    monkeypatch.setenv("SFT_CONFIG_PATH", str(tmp_path))
    return tmp_path


def write(folder: Path, name: str, extra: str = "") -> Path:
    path = folder / "recipes" / f"{name}.yaml"
    path.write_text(RECIPE.format(name=name) + extra)
    return path


def test_the_embedded_files_load() -> None:
    catalog = load_catalog([PACKAGE_DIR])
    assert not catalog.problems
    assert catalog.recipes["access_policy_lora"].dataset == "access_policy"


def test_a_broken_file_is_named_and_leaves_the_others(folder: Path) -> None:
    write(folder, "good")
    broken = write(folder, "broken", "training:\n  epoch: 3\n")
    catalog = load_catalog()
    assert "good" in catalog.recipes and "access_policy_lora" in catalog.recipes
    assert catalog.problems[str(broken)].startswith(
        f"{broken}:6: unknown key 'training.epoch' (did you mean 'epochs'?)"
    )


@pytest.mark.parametrize(
    ("extra", "line", "words"),
    [
        ("training: {learning_rate: fast}\n", 5, "training.learning_rate"),
        ("training:\n  epochs: 1\n  epochs: 2\n", 7, "given twice"),
        ("tokens: {overflow: keep}\n", 5, "truncate_prompt"),
        ("evaluation:\n  graders:\n    - {name: a, kind: regexx, pattern: x}\n", 7, "regex"),
        (
            "evaluation:\n  graders:\n    - {name: a, kind: json_fields, feilds: [x]}\n",
            7,
            "did you mean 'fields'",
        ),
        *(
            (f"evaluation:\n  graders:\n    - {{name: {name}, kind: exact_match}}\n", 5, f"be named {name}")
            for name in ("reply", "group", "val_loss", "gates")
        ),
        ('evaluation: {gates: ["nothing >= 1"]}\n', 5, "no grader is named nothing"),
        ("evaluation: {rank_by: [-loss]}\n", 5, "no grader is named loss"),
        ("packing: [\n", 6, "not valid YAML"),
    ],
)
def test_each_mistake_names_file_line_and_remedy(folder: Path, extra: str, line: int, words: str) -> None:
    path = write(folder, "r", extra)
    problem = load_catalog().problems[str(path)]
    assert f"{path}:{line}:" in problem
    assert words in problem


def test_a_missing_key_and_an_unknown_dataset(folder: Path) -> None:
    missing = folder / "recipes" / "a.yaml"
    missing.write_text("name: a\ndataset: d\n")
    unknown = folder / "recipes" / "b.yaml"
    unknown.write_text("name: b\ndataset: dd\nmodel: {base: m}\n")
    problems = load_catalog().problems
    assert "the key 'model' is missing" in problems[str(missing)]
    assert "no dataset is named 'dd' (did you mean 'd'?)" in problems[str(unknown)]


def test_extends_inherits_and_overrides(folder: Path) -> None:
    write(folder, "parent", "training: {epochs: 5, clip: 0.5}\n")
    (folder / "recipes" / "child.yaml").write_text("name: child\nextends: parent\ntraining: {epochs: 7}\n")
    child = load_catalog().recipes["child"]
    assert (child.training.epochs, child.training.clip, child.dataset) == (7, 0.5, "d")


def test_an_error_in_an_inherited_value_names_the_parents_file(folder: Path) -> None:
    parent = write(folder, "parent", "training: {epochs: -5}\n")
    (folder / "recipes" / "child.yaml").write_text("name: child\nextends: parent\n")
    assert f"{parent}:5:" in load_catalog().problems[str(folder / "recipes" / "child.yaml")]


def test_extends_in_a_circle_is_told(folder: Path) -> None:
    for a, b in (("one", "two"), ("two", "one")):
        (folder / "recipes" / f"{a}.yaml").write_text(
            f"name: {a}\nextends: {b}\ndataset: d\nmodel: {{base: m}}\n"
        )
    assert all("extends this file in turn" in p for p in load_catalog().problems.values())


def test_set_takes_yaml_values_and_names_itself_in_errors(folder: Path) -> None:
    write(folder, "r")
    recipe = find_recipe(
        load_catalog(),
        "r",
        ["training.learning_rate=1e-4", "evaluation.require_improvement=false", "model.lora.r=4"],
    )
    assert (recipe.training.learning_rate, recipe.evaluation.require_improvement, recipe.model.lora.r) == (
        1e-4,
        False,
        4,
    )
    with pytest.raises(InputError, match=r"--set training\.learning_rat=1.*did you mean 'learning_rate'"):
        find_recipe(load_catalog(), "r", ["training.learning_rat=1"])


def test_an_unknown_recipe_suggests_the_nearest(folder: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'access_policy_lora'"):
        find_recipe(load_catalog(), "access_policy_lor")


def test_two_files_with_one_name(folder: Path) -> None:
    write(folder, "a")
    (folder / "recipes" / "b.yaml").write_text(RECIPE.format(name="a"))
    assert "is taken by" in load_catalog().problems[str(folder / "recipes" / "b.yaml")]


def test_the_schemas_for_editors_are_up_to_date() -> None:
    for name, content in schemas().items():
        assert (PACKAGE_DIR / "schemas" / name).read_text() == content, (
            "run python -m sft_pipeline.config.schemas"
        )


def bomb(levels: int) -> str:
    """A few lines of aliases that stand for 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bomb(9), "its aliases stand for"),
        (bomb(40), "its aliases stand for"),
        ("a: &a [*a]\n", "contains itself"),
        ("a: &a\n  b: *a\n", "contains itself"),
        ("a: " + "[" * 5_000 + "]" * 5_000 + "\n", "nested too deeply"),
    ],
)
def test_a_yaml_bomb_is_one_message_in_bounded_time(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        read_yaml(path)
    flow = content.removeprefix("a: ").strip()
    if said == "nested too deeply":
        with pytest.raises(InputError, match=said):
            parse_set(f"training={flow}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: " + b"[" * 100_000, "nested too deeply"),
        (b"a: " + b"{b: " * 100_000, "nested too deeply"),
        (b"\n".join(b" " * n + b"a:" for n in range(1_200)), "nested too deeply"),
        (b"a: [" + b"1, " * 33_000_000 + b"1]", "more than 1,000,000 bytes"),
        (b"a: b\0c", "not valid YAML: unacceptable character"),
        (b"\xff\xfe\xfa", "cannot read"),
        (b"- a\n- b\n", "found a sequence"),
        (b"hello", "found a scalar"),
        (b"", "the file is empty"),
        (b"a: " + b"9" * 5_000, "not valid YAML"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_configuration_is_one_message(folder: Path, content: bytes, said: str) -> None:
    write(folder, "good")
    for kind in ("recipes", "datasets"):
        path = folder / kind / "bad.yaml"
        path.write_bytes(content)
        catalog = load_catalog()
        assert said in catalog.problems[str(path)] and "\n" not in catalog.problems[str(path)]
        assert len(catalog.problems[str(path)]) < 500
        assert "good" in catalog.recipes


def test_a_pipe_is_no_configuration(folder: Path) -> None:
    os.mkfifo(folder / "recipes" / "pipe.yaml")
    write(folder, "good")
    catalog = load_catalog()
    assert "not a file" in catalog.problems[str(folder / "recipes" / "pipe.yaml")]
    assert "good" in catalog.recipes


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("evaluation: {graders: [{name: g, kind: regex, pattern: '('}]}\n", "grader g: not a regular"),
        (
            "evaluation: {graders: [{name: g, kind: json_schema, schema: {$ref: '#'}}]}\n",
            "grader g: the schema refers to itself without end",
        ),
        (
            "evaluation: {graders: [{name: g, kind: json_schema, schema: {$ref: 'https://e.com/s'}}]}\n",
            "grader g: the schema refers to 'https://e.com/s'",
        ),
        (
            "evaluation: {graders: [{name: g, kind: json_schema, schema: {format: hostname}}]}\n",
            "grader g: the schema asks for the format 'hostname'",
        ),
        (
            "evaluation: {graders: [{name: g, kind: json_schema, schema: /nowhere/s.json}]}\n",
            "grader g: the schema file /nowhere/s.json cannot be read",
        ),
        ("model: {base: b, freeze: ['(']}\n", 'freeze: "(" is not a regular expression'),
        ("model: {base: b, lora: {target_modules: '*'}}\n", "target_modules: not a regular expression"),
        (f"training: {{epochs: {'x' * 100_000}}}\n", "training.epochs"),
    ],
)
def test_patterns_and_schemas_are_checked_with_the_recipe(folder: Path, extra: str, words: str) -> None:
    write(folder, "good")
    bad = folder / "recipes" / "bad.yaml"
    model = "" if extra.startswith("model") else "model: {base: b}\n"
    bad.write_text(f"name: bad\ndataset: d\n{model}{extra}")
    catalog = load_catalog()
    assert words in catalog.problems[str(bad)] and catalog.problems[str(bad)].startswith(f"{bad}:")
    assert len(catalog.problems[str(bad)]) < 1000
    assert "good" in catalog.recipes
    with pytest.raises(InputError, match=r"bad\.yaml"):
        find_recipe(catalog, "bad")


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    path = tmp_path / "few.yaml"
    path.write_text(bomb(3))
    assert len(read_yaml(path).value["a2"]) == 10


def test_no_process_sends_telemetry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_TELEMETRY:
        monkeypatch.delenv(name, raising=False)
    set_environment()
    assert {os.environ[name] for name in NO_TELEMETRY} == {"true"}
    settings = (PACKAGE_DIR.parent / "dagster.yaml").read_text()
    assert "telemetry: {enabled: false}" in settings

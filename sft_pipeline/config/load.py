"""Finds and loads dataset and recipe files. One broken file is reported and takes no other down."""

import difflib
import os
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.foreign_names import hint
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.config.yaml_lines import Document, Loc, Origin, overlay, parse_set, read_yaml
from sft_pipeline.errors import InputError
from sft_pipeline.graders.config import JsonSchemaGrader
from sft_pipeline.json_schemas import check_schema, read_schema
from sft_pipeline.project import PACKAGE_DIR, project_path

M = TypeVar("M", bound=BaseModel)
PRESETS = PACKAGE_DIR / "config" / "presets"


@dataclass
class Catalog:
    """Everything that loaded, and one message per file that did not."""

    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    recipes: dict[str, RecipeConfig] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def config_folders() -> list[Path]:
    """The package's own folder, then those of SFT_CONFIG_PATH; each has `datasets/` and `recipes/`."""
    extra = [project_path(p) for p in os.environ.get("SFT_CONFIG_PATH", "").split(os.pathsep) if p]
    return [PACKAGE_DIR, *extra]


def load_catalog(folders: Sequence[Path] | None = None) -> Catalog:
    """Loads every file of every folder."""
    catalog = Catalog()
    folders = config_folders() if folders is None else folders
    for folder in folders:
        if not folder.is_dir():
            catalog.problems[str(folder)] = f"{folder}: no such folder (named in SFT_CONFIG_PATH)"
    for path in _files(folders, "datasets"):
        try:
            _add(catalog, catalog.datasets, "dataset", path, validate(DatasetConfig, read_yaml(path)))
        except InputError as error:
            catalog.problems[str(path)] = str(error)
    for path in _files(folders, "recipes"):
        try:
            recipe = load_recipe(path, folders=folders)
            _check_dataset(recipe, catalog, path)
            _add(catalog, catalog.recipes, "recipe", path, recipe)
        except InputError as error:
            catalog.problems[str(path)] = str(error)
    return catalog


def find_recipe(
    catalog: Catalog, name_or_path: str, overrides: Iterable[str] = (), *, read_schemas: bool = False
) -> RecipeConfig:
    """The recipe of this name or in this file, with `--set` overrides applied.

    Args:
        read_schemas: As for `load_recipe`. Only for overrides of somebody who may read these files: not for
            those in the tags of a run.

    Raises:
        InputError: There is none, or it does not validate; with the nearest name or the file's own error.
    """
    path = _file_of("recipe", name_or_path, catalog)
    recipe = load_recipe(path, overrides=tuple(overrides), read_schemas=read_schemas)
    _check_dataset(recipe, catalog, path)
    return recipe


def find_dataset(catalog: Catalog, name_or_path: str) -> DatasetConfig:
    """The dataset of this name or in this file.

    Raises:
        InputError: There is none, or it does not validate.
    """
    return validate(DatasetConfig, read_yaml(_file_of("dataset", name_or_path, catalog)))


def _file_of(kind: str, name_or_path: str, catalog: Catalog) -> Path:
    """The file of a recipe or dataset.

    Raises:
        InputError: There is none, with the nearest name, or it does not validate.
    """
    if name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path:
        path = Path(os.path.expanduser(name_or_path))
        path = path if path.is_file() else project_path(name_or_path)
        if not path.is_file():
            raise InputError(f"no {kind} file at {path}")
        return path
    if found := catalog.files.get(f"{kind} {name_or_path}"):
        return found
    for broken, problem in catalog.problems.items():
        if Path(broken).stem == name_or_path:
            raise InputError(problem)
    known = list(catalog.recipes if kind == "recipe" else catalog.datasets)
    raise InputError(
        f"no {kind} is named {name_or_path!r}{_nearest(name_or_path, known)}; "
        f"known: {', '.join(known) or 'none'}"
    )


def load_recipe(
    path: Path,
    overrides: tuple[str, ...] = (),
    folders: Sequence[Path] | None = None,
    *,
    read_schemas: bool = True,
) -> RecipeConfig:
    """One recipe file with what it extends and what overrides it.

    Args:
        read_schemas: Whether the files with the graders' JSON Schemas are read and checked too. Evaluation
            does it in any case, but only after the training.

    Raises:
        InputError: With file, line, field and remedy.
    """
    document = _extended(read_yaml(path), path, config_folders() if folders is None else folders, seen=())
    for option in overrides:
        document = overlay(document, parse_set(option))
    recipe = validate(RecipeConfig, document)
    for index, grader in enumerate(recipe.evaluation.graders if read_schemas else ()):
        if isinstance(grader, JsonSchemaGrader) and isinstance(grader.schema_, str):
            try:
                check_schema(read_schema(project_path(grader.schema_)))
            except ValueError as error:
                origin = document.origin(("evaluation", "graders", index, "schema"))
                raise InputError(
                    f"{origin}: evaluation.graders.{index}.schema: grader {grader.name}: {error}"
                ) from error
    return recipe


def _extended(document: Document, path: Path, folders: Sequence[Path], seen: tuple[Path, ...]) -> Document:
    parent = document.value.get("extends")
    if not isinstance(parent, str):
        return document
    origin = document.origin(("extends",))
    candidates = {
        p.stem: p
        for p in [*PRESETS.glob("*.yaml"), *_files(folders, "recipes"), *path.parent.glob("*.y*ml")]
        if p != path
    }
    target = candidates.get(parent)
    if target is None:
        raise InputError(
            f"{origin}: extends: nothing is named {parent!r}{_nearest(parent, list(candidates))}; "
            f"known: {', '.join(sorted(candidates))}"
        )
    if target in seen:
        raise InputError(f"{origin}: extends: {parent} extends this file in turn")
    return overlay(_extended(read_yaml(target), target, folders, (*seen, path)), document)


def validate(model: type[M], document: Document) -> M:
    """The typed configuration of a document.

    Raises:
        InputError: One line per error: file, line, field, cause, and the nearest valid key for an unknown
            one.
    """
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        raise InputError("\n".join(_explain(model, document, e) for e in error.errors())) from error


def _explain(model: type[BaseModel], document: Document, error: Any) -> str:
    loc: Loc = tuple(part for part in error["loc"] if not _is_tag(part, document, error["loc"]))
    origin: Origin = document.origin(loc)
    name = ".".join(map(str, loc))[:300] or model.__name__
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, loc[:-1], document)
        close = f" ({foreign})" if (foreign := hint(str(loc[-1]))) else _nearest(str(loc[-1]), known)
        return f"{origin}: unknown key {name!r}{close}; known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{origin}: the key {name!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    given = f" (given: {repr(error['input'])[:300]})" if not isinstance(error["input"], (dict, list)) else ""
    return f"{origin}: {name}: {message}{given}"


def _is_tag(part: str | int, document: Document, loc: Loc) -> bool:
    """Whether a part of an error's location is a union's tag, which is not a key of the file."""
    index = loc.index(part)
    return (
        isinstance(part, str)
        and index > 0
        and isinstance(loc[index - 1], int)
        and loc[:index] in document.origins
        and (*loc[:index], part) not in document.origins
    )


def _keys_at(model: type[BaseModel], loc: Loc, document: Document) -> list[str]:
    """The keys that are valid at a location of a model."""
    kinds: list[Any] = [model]
    value: Any = document.value
    for part in loc:
        value = value[part] if isinstance(value, (dict, list)) else None  # type: ignore[index]
        kinds = [t for kind in kinds for t in _step(kind, part)]
    models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    if isinstance(value, dict) and "kind" in value:  # the one member of a discriminated union that was meant
        models = [
            m
            for m in models
            if "kind" in m.model_fields
            and value["kind"] in typing.get_args(m.model_fields["kind"].annotation)
        ] or models
    return sorted({f.alias or n for m in models for n, f in m.model_fields.items()})


def _step(kind: Any, part: str | int) -> list[Any]:
    if isinstance(part, int):
        return [t for arg in typing.get_args(kind) for t in _flatten(arg)]
    if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
        return _flatten(kind.model_fields[part].annotation)
    return []


def _flatten(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _flatten(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [t for arg in typing.get_args(annotation) for t in _flatten(arg)]
    return [annotation]


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _check_dataset(recipe: RecipeConfig, catalog: Catalog, path: Path) -> None:
    if recipe.dataset not in catalog.datasets:
        known = list(catalog.datasets)
        broken = [p for p in catalog.problems.values() if f"{os.sep}{recipe.dataset}.y" in p]
        more = f"its file does not load: {broken[0]}" if broken else f"known: {', '.join(known) or 'none'}"
        name = f"{recipe.dataset!r}{_nearest(recipe.dataset, known)}"
        raise InputError(f"{path}: dataset: no dataset is named {name}; {more}")


def _add(catalog: Catalog, into: dict[str, Any], kind: str, path: Path, config: Any) -> None:
    taken = catalog.files.get(f"{kind} {config.name}") or (
        kind == "recipe" and catalog.files.get(f"dataset {config.name}")
    )
    if taken:
        raise InputError(f"{path}: name: {config.name!r} is taken by {taken}")
    into[config.name] = config
    catalog.files[f"{kind} {config.name}"] = path


def _files(folders: Sequence[Path], kind: str) -> list[Path]:
    return [
        p for folder in folders for p in sorted((folder / kind).glob("*.y*ml")) if not p.name.startswith(".")
    ]

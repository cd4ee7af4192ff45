"""The keys of a configuration, one key changed in it, and small branches that are really built of it."""

import copy
import json
import os
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.stages.run import Run, needed_for, run_stage
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Artifact, Store


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section and of the sections in it, as a path.

    Of a list of sections `sources[].path`; where they have kinds, `graders[regex].pattern`. A section that
    may be null is a key too: that which switches it on.
    """
    for name, info in model.model_fields.items():
        yield from _leaves_of(info.annotation, f"{prefix}{info.alias or name}")


def _leaves_of(kind: Any, key: str) -> Iterator[str]:
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if _is_section(kind):
        yield from leaves(kind, f"{key}.")
    elif get_origin(kind) in (Union, types.UnionType) and any(map(_is_section, get_args(kind))):
        yield key
        for one in get_args(kind):
            yield from _leaves_of(one, key) if _is_section(one) else ()
    elif sections := _sections_inside(kind):
        for section in sections:
            tag = f"{key}[{_tag(section) if len(sections) > 1 else ''}]"
            yield from leaves(section, f"{tag}.")
    else:
        yield key


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _sections_inside(kind: Any) -> list[type[BaseModel]]:
    """The sections that a list or dict holds, one or a union of them."""
    if _is_section(kind):
        return [kind]
    return [section for inner in get_args(kind) for section in _sections_inside(inner)]


def _tag(section: type[BaseModel]) -> str:
    """The kind that tells a section from others of its list."""
    kind = section.model_fields["kind"].annotation
    assert get_origin(kind) is Literal
    return get_args(kind)[0]


def with_keys(document: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a document with some keys set."""
    found = dict(document)
    for key, value in given.items():
        found = changed(found, key, value)
    return found


def changed(document: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a document with one key set. `sources[].` is its first one; `graders[regex].kind` exchanges
    the whole grader, since another kind has other keys.
    """
    document = copy.deepcopy(dict(document))
    at: Any = document
    *sections, last = key.split(".")
    for section in sections:
        name, _, kind = section.rstrip("]").partition("[")
        at = at.setdefault(name, {})
        if section.endswith("]"):
            at = next(item for item in at if not kind or item["kind"] == kind)
    if last == "kind":
        at.clear()
        at.update(value)
    else:
        at[last] = value
    return document


@dataclass(frozen=True)
class Side:
    """A dataset and a recipe as they are written, before or after the change."""

    dataset_document: Mapping[str, Any]
    recipe_document: Mapping[str, Any]

    @property
    def dataset(self) -> DatasetConfig:
        return DatasetConfig.model_validate(self.dataset_document)

    @property
    def recipe(self) -> RecipeConfig:
        return RecipeConfig.model_validate(self.recipe_document)

    @property
    def branch(self) -> Branch:
        return Branch(self.dataset, snapshots(self.dataset.sources)[-1], self.recipe)

    def config(self, stage: str) -> Any:
        """What the stage is given of both."""
        return STAGES[stage].config(self.branch)

    def written(self) -> str:
        return json.dumps([self.dataset_document, self.recipe_document], sort_keys=True)


@dataclass
class Workshop:
    """A project with its store, in which branches are built up to the stage that is looked at.

    What the change does not concern is reused, as it is for a user: by its fingerprint. So a key that is read
    and is missing in a fingerprint changes nothing here either.
    """

    root: Path
    built: dict[tuple[str, str], Artifact] = field(default_factory=dict)

    def artifact(self, side: Side, stage: str) -> Artifact:
        """The artifact of a stage, whether or not its checks passed."""
        at = (side.written(), stage)
        if at not in self.built:
            # A training keeps it for its own process; here all have one.
            os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
            for name in needed_for(stage, STAGES):
                found = run_stage(STAGES[name], STAGES, side.branch, Run(Store(), Reporter())).artifact
                self.built[side.written(), name] = found
        return self.built[at]

    def fresh(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.root))

    def write_recipe(self, name: str, document: Mapping[str, Any]) -> Path:
        path = self.root / "recipes" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(dict(document)))
        return path


Observation = Callable[[Workshop, Side], Any]


@dataclass(frozen=True)
class Key:
    """A key, a value for it, and something outside the configuration that the value changes.

    Attributes:
        value: The changed one; of a `kind`, the whole grader.
        seen: What is looked at.
        before, after: What is seen without and with the change.
        given: Keys that both have, for example the schedule whose parameter is changed.
    """

    key: str
    value: Any
    seen: Observation
    before: Any
    after: Any
    given: Mapping[str, Any] = field(default_factory=dict)


class Different:
    """Stands for what is seen on a side where no figure can be given; it differs from the other side's."""

    def __repr__(self) -> str:
        return "something else"


DIFFERENT = Different()


def ids_of(keys: Sequence[Key]) -> list[str]:
    """The names of the tests of a table: its keys, numbered from the second entry of a key on."""
    seen: Counter[str] = Counter()
    names = []
    for key in keys:
        seen[key.key] += 1
        names.append(key.key if seen[key.key] == 1 else f"{key.key} {seen[key.key]}")
    return names


def check_complete(model: type[BaseModel], table: Sequence[Key]) -> None:
    """Fails by name for a key without an entry, and for an entry whose key is gone."""
    keys, written = set(leaves(model)), {entry.key for entry in table}
    assert not keys - written, f"no entry shows what these keys change: {sorted(keys - written)}"
    assert not written - keys, f"these entries are of no key: {sorted(written - keys)}"


def check_changes(shop: Workshop, key: Key, before: Side, after: Side) -> None:
    """Looks at both sides, which must differ, and must show what the entry says."""
    seen = key.seen(shop, before), key.seen(shop, after)
    assert seen[0] != seen[1], f"{key.key}: {key.value!r} changes nothing: {seen[0]!r} is seen either way"
    for found, expected in zip(seen, (key.before, key.after)):
        assert expected is DIFFERENT or found == expected, (
            f"{key.key}: {seen[0]!r} and with {key.value!r} {seen[1]!r} are seen, "
            f"not {key.before!r} and {key.after!r}"
        )

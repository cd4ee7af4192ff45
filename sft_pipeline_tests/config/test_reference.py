"""docs/configuration.md is what the classes say, and each of its examples is a value that loads."""

from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from sft_pipeline.config.dataset import DatasetConfig, SourceConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.config.reference import NOTES, TARGET, KeyRow, reference, rows
from sft_pipeline_tests.command import ROOT
from sft_pipeline_tests.config.every_key import leaves

ALL = [(model, row) for model in NOTES for row in rows(model)]


def test_the_page_is_up_to_date() -> None:
    assert TARGET.read_text() == reference(), "run python -m sft_pipeline.config.reference"


@pytest.mark.parametrize("model", [DatasetConfig, RecipeConfig])
def test_every_key_is_there_with_words_and_an_example(model: Any) -> None:
    found = {row.key: row for row in rows(model)}
    assert set(leaves(model)) <= found.keys()
    assert not [key for key, row in found.items() if not row.description]
    assert not [k for k, row in found.items() if row.example.endswith(("null", "[]", "{}", '""'))]


@pytest.mark.parametrize(("model", "row"), ALL, ids=[row.key for _, row in ALL])
def test_each_example_is_a_value_of_its_key(model: Any, row: KeyRow) -> None:
    value = yaml.safe_load(row.example)
    [(name, given)] = value.items()
    field: Any = model
    for part in row.key.split("."):
        plain, _, tag = part.partition("[")
        info = next(i for n, i in field.model_fields.items() if n == plain or i.alias == plain)
        field = (
            TypeAdapter(info.rebuild_annotation()) if part == row.key.split(".")[-1] else _inside(info, tag)
        )
    assert name == row.key.split(".")[-1] and field.validate_python(given) is not None


def _inside(info: Any, tag: str) -> Any:
    """The class of configuration in a field, of a union the one with this kind."""
    found: list[Any] = []

    def look(kind: Any) -> None:
        if hasattr(kind, "model_fields"):
            found.append(kind)
        for arg in getattr(kind, "__args__", ()):
            look(arg)

    look(info.annotation)
    kinds = [
        k
        for k in found
        if "kind" in k.model_fields and tag.rstrip("]") in k.model_fields["kind"].annotation.__args__
    ]
    return (kinds or found)[0]


def test_the_sources_of_the_guide_to_data_load() -> None:
    blocks = (ROOT / "docs" / "data.md").read_text().split("```yaml\n")[1:]
    sources = 0
    for block in blocks:
        document = yaml.safe_load(block.partition("```")[0])
        if isinstance(document, list):
            sources += len([SourceConfig.model_validate(source) for source in document])
        else:
            DatasetConfig.model_validate({"name": "d", "sources": [{"path": "x"}], **document})
    assert sources >= 10

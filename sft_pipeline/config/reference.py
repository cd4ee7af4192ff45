"""Writes docs/configuration.md, every key of both files: `python -m sft_pipeline.config.reference`."""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.project import PACKAGE_DIR

TARGET = PACKAGE_DIR.parent / "docs" / "configuration.md"
HEAD = """# Every key

Two kinds of YAML files: a dataset file in `datasets/`, a recipe file in `recipes/`. Keys are strict: an unknown one is an error with file, line and the nearest valid one. Written by `python -m sft_pipeline.config.reference` from the same classes that read the files.
"""  # noqa: E501 - Markdown
NOTES: dict[type[BaseModel], str] = {
    DatasetConfig: "## The dataset file\n\n[data.md](data.md) shows sources for a dozen shapes of data.",
    RecipeConfig: "## The recipe file\n\n`--set KEY=VALUE` overrides any of them for one run.",
}


TABLE_HEAD = "| key | type | default | what it does | example |\n| --- | --- | --- | --- | --- |"
# Where a default shows nothing.
EXAMPLES: dict[str, Any] = {
    "name": "tickets_lora",
    "description": "Answers tickets.",
    "owner": "team:support",
    "extends": "lora",
    "dataset": "tickets",
    "sources[].path": "data/tickets",
    "sources[].where": "reward >= 0.5",
    "sources[].transform": "my_rows:best_replies",
    "sources[].text": {"prompt": "Which queue? {text}"},
    "sources[].roles": {"customer": "user", "agent": "assistant"},
    "sources[].files": "*.jsonl",
    "sources[].join": {"files": "answers*.csv", "by": "id"},
    "sources[].join.files": "answers*.csv",
    "sources[].join.path": "data/answers.csv",
    "sources[].join.by": "id",
    "sources[].join.key": "prompt_id",
    "sources[].join.fields": {"completion": "reply"},
    "sources[].limit": 50000,
    "sources[].columns": {"prompt": "question", "group": "thread_id"},
    "sources[].unused": ["image"],
    "contract.require_group": True,
    "split.groups.train": ["T17"],
    "split.groups.validation": ["T18"],
    "split.groups.test": ["T19"],
    "split.time_column": "created_at",
    "split.time_cutoff": "2026-05-20",
    "split.near_duplicates.max_leakage": 0.01,
    "model.base": "models/my-base",
    "model.revision": "0123456789abcdef0123456789abcdef01234567",
    "model.tokenizer": "models/my-tokenizer",
    "model.freeze": ["embed_tokens"],
    "template.variables": {"enable_thinking": False},
    "template.ignore": ["reasoning_content"],
    "template.system": "You answer tickets.",
    "training.max_steps": 200,
    "training.learning_rate": 1.0e-4,
    "training.blocks_per_update": 16,
    "training.neftune_alpha": 5.0,
    "training.eval_steps": 50,
    "training.save_steps": 100,
    "training.keep_checkpoints": 3,
    "training.early_stopping": {"patience": 3},
    "training.report_to": ["tensorboard"],
    "evaluation.graders[json_schema].schema": {"type": "object", "required": ["queue"]},
    "evaluation.graders[json_fields].fields": ["queue", "order.id"],
    "evaluation.graders[regex].pattern": "queue: (\\w+)",
    "evaluation.graders[regex].group": 1,
    "evaluation.graders[numeric_answer].after": "####",
    "evaluation.graders[python].callable": "my_graders:polite",
    "evaluation.gates": ["exact >= 0.9"],
    "evaluation.max_rows": 200,
    "export.license": "apache-2.0",
    "retrain.cron": "0 3 * * 1",
}


@dataclass(frozen=True)
class KeyRow:
    """One key: its dotted name, the type in words, the default as YAML, what it does, an example."""

    key: str
    kind: str
    default: str
    description: str
    example: str


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for model, head in NOTES.items():
        parts.append(head)
        section = None
        for row in rows(model):
            name = row.key.rpartition(".")[0] or "top level"
            if name != section:
                section = name
                parts.append(f"### {name}\n\n{TABLE_HEAD}")
            last = row.key.rpartition(".")[2]
            cells = (f"`{last}`", row.kind, row.default, row.description, f"`{row.example}`")
            parts[-1] += "\n| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
    return "\n\n".join(parts) + "\n"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[KeyRow]:
    """The keys of a section, then those of the sections in it."""
    inside: list[KeyRow] = []
    for name, info in model.model_fields.items():
        key, kind = f"{prefix}{info.alias or name}", info.annotation
        sections, listed = _sections(kind)
        if not sections or _may_be_null(kind):
            said = _description(model, name, info)
            yield KeyRow(key, _words(kind), _default(info), said, _example(key, kind, info))
        for section in sections:
            tag = f"[{_tag(section)}]" if len(sections) > 1 else "[]" if listed else ""
            inside += rows(section, f"{key}{tag}.")
    yield from inside


def _sections(kind: Any) -> tuple[list[type[BaseModel]], bool]:
    """(the classes of configuration in a type, whether they are elements of a list)."""
    if get_origin(kind) is Annotated:
        return _sections(get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind], False
    if get_origin(kind) in (Union, types.UnionType, list):
        found = [section for arg in get_args(kind) for section in _sections(arg)[0]]
        return found, get_origin(kind) is list
    return [], False


def _may_be_null(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def _tag(section: type[BaseModel]) -> str:
    return str(get_args(section.model_fields["kind"].annotation)[0])


def _words(kind: Any) -> str:
    """A type as people say it."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is list:
        return f"list of {_words(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} {_words(args[0])}"
    if origin is dict:
        return f"{_words(args[0])} → {_words(args[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "null"}
    return "section" if isinstance(kind, type) and issubclass(kind, BaseModel) else names.get(kind, "any")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    return f"`{_yaml(value)}`"


def _description(model: type[BaseModel], name: str, info: FieldInfo) -> str:
    """What a key does; of a kind of graders, what the kind does."""
    if name == "kind":
        return " ".join((model.__doc__ or "").split())
    if name == "name" and "kind" in model.model_fields:
        return "names the score: in gates, rank_by, tables and MLflow"
    return (info.description or "").replace("\n", " ")


def _example(key: str, kind: Any, info: FieldInfo) -> str:
    """A line of YAML: an example, else the default."""
    last = key.rpartition(".")[2]
    if key in EXAMPLES:
        return f"{last}: {_yaml(EXAMPLES[key])}"
    if last == "name":
        return "name: exact"
    if get_origin(kind) is Literal:
        return f"{last}: {get_args(kind)[-1]}"
    return f"{last}: {_yaml(None if info.is_required() else info.get_default(call_default_factory=True))}"


def _yaml(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, BaseModel):
        return _yaml(value.model_dump(mode="json", by_alias=True))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        try:
            plain = ":" not in value and yaml.safe_load(f"[{value}]") == [value]
        except yaml.YAMLError:
            plain = False
        return value if plain and value else json.dumps(value)
    return json.dumps(value)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")

"""Dataset and recipe files for data that nobody has described yet."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.errors import InputError
from sft_pipeline.preview.guess import Guess, guess
from sft_pipeline.preview.sample import Sample, first_rows, sample_dataset
from sft_pipeline.project import project_path, project_root
from sft_pipeline.stages.raw_rows.config import RawSource
from sft_pipeline.stages.raw_rows.find import find_files, subfolders
from sft_pipeline.stages.raw_rows.locate import is_hub, snapshots
from sft_pipeline.text.config import NAMED_TEMPLATES
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer

SNAPSHOT = re.compile(r"\d{4}-\d\d(-\d\d)?|v?\d+(\.\d+)*|\d{8}")
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TURN_TOKENS = 8  # that a template puts around a turn, at most, in the templates at hand
LABELS = 200  # different replies, up to which they are labels
NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?"


@dataclass
class Draft:
    """What was guessed, and the two files.

    Attributes:
        task: "labels", "JSON", "numbers", "conversations" or "conversations with tools".
        unsure: What somebody should look at.
    """

    name: str
    dataset: dict[str, Any]
    recipe: dict[str, Any]
    task: str
    sample: Sample
    comments: dict[str, str] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)


def draft(path: str, name: str | None, base: str) -> Draft:
    """Looks at the data and drafts its files.

    Args:
        path: A file, a folder, or an address of the hub.
        base: Folder or hub id of the model that is to be trained.

    Raises:
        InputError: There are no rows, or no guess how they read.
    """
    name = name or _name_of(path)
    source, snapshot, unsure = _place(path)
    rows, _ = first_rows(RawSource.model_validate(source), snapshot)
    found = guess(rows)
    if found.failed:
        raise InputError(
            f"{path}: {found.failed}. Write a dataset file by hand: README.md shows one, docs/data.md has "
            "ten shapes of data"
        )
    dataset: dict[str, Any] = {"name": name, "sources": [source | found.source], "contract": found.contract}
    if not found.contract:
        del dataset["contract"]
    config = DatasetConfig.model_validate(dataset)
    sample = sample_dataset(config, snapshot or snapshots(config.sources)[-1])
    if not sample.rows:
        reasons = Counter(reason for row in sample.rejected for reason in row["reasons"])
        named = ", ".join(f"{reason} {n:,}" for reason, n in reasons.most_common(4))
        raise InputError(f"{path}: no row fits the guess {json.dumps(found.source)}: {named}")
    if sample.reject_rate > config.contract.max_reject_rate:
        most = min(1.0, round(sample.reject_rate * 1.5, 2))
        dataset["contract"] = {**found.contract, "max_reject_rate": most}
        unsure.append(f"{sample.reject_rate:.0%} of the first rows are rejected: see `sft preview {name}`")
    recipe, task, comments = _recipe(name, base, sample)
    return Draft(name, dataset, recipe, task, sample, comments | _comments(found), [*unsure, *found.unsure])


def write_files(draft_: Draft, folder: Path) -> tuple[Path, Path]:
    """Writes `datasets/<name>.yaml` and `recipes/<name>_lora.yaml`; returns their paths.

    Raises:
        InputError: One of them is there already.
    """
    paths = folder / "datasets" / f"{draft_.name}.yaml", folder / "recipes" / f"{draft_.recipe['name']}.yaml"
    for path in paths:
        if path.exists():
            raise InputError(f"{path} is there already: remove it, or give another --name")
    for path, kind, document in zip(paths, ("dataset", "recipe"), (draft_.dataset, draft_.recipe)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_yaml(kind, document, draft_.comments), encoding="utf-8")
    return paths


# -- where the data is -----------------------------------------------------------------------------


def _name_of(path: str) -> str:
    stem = PurePosixPath(path.rstrip("/").partition("@")[0]).name.partition(".")[0]
    name = re.sub(r"\W+", "_", stem, flags=re.ASCII).strip("_").lower()
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


def _place(path: str) -> tuple[dict[str, Any], str, list[str]]:
    """(keys of the source, the snapshot to look at, what is unsure)."""
    if is_hub(path):
        return {"path": path}, "", []
    here = project_path(path)
    if "://" not in path and not here.exists():
        here = Path(path).resolve()  # as the shell sees it
        if not here.exists():
            raise InputError(f"{path}: no such file or folder")
    given = path
    if "://" not in path:
        root = project_root().resolve()
        given = here.relative_to(root).as_posix() if here.is_relative_to(root) else here.as_posix()
    if here.is_dir():
        names = sorted(subfolders(str(here)))
        if names and all(SNAPSHOT.fullmatch(name) for name in names):
            return {"path": given}, names[-1], []
    source: dict[str, Any] = {"path": given, "static": True}
    unsure = _choose_files(source) if here.is_dir() else []
    return source, "", unsure


def _choose_files(source: dict[str, Any]) -> list[str]:
    """Takes those files of a folder that have the same columns as most of its bytes."""
    files = find_files(RawSource.model_validate(source), "").files
    kinds: dict[frozenset[str], list[str]] = defaultdict(list)
    sizes: Counter[frozenset[str]] = Counter()
    for file in files[:50]:
        one = RawSource(path=f"{source['path'].rstrip('/')}/{file.name}", static=True)
        rows, _ = first_rows(one, "", 20)
        columns = frozenset(rows[0]) if rows else frozenset()
        kinds[columns].append(file.name)
        sizes[columns] += file.bytes if rows else 0
    if len(kinds) < 2:
        return []
    best = sizes.most_common(1)[0][0]
    chosen, others = kinds[best], [n for columns, names in kinds.items() if columns != best for n in names]
    endings = {PurePosixPath(name).suffix for name in others}
    suffix = PurePosixPath(chosen[0]).suffix
    same = suffix not in endings and all(name.endswith(suffix) for name in chosen)
    source["files"] = f"*{suffix}" if same and len(chosen) > 1 else chosen[0]
    return [f"{', '.join(others[:5])} left out: other columns than {', '.join(chosen[:3])}"]


# -- the recipe ------------------------------------------------------------------------------------


def _recipe(name: str, base: str, sample: Sample) -> tuple[dict[str, Any], str, dict[str, str]]:
    """(recipe, task, comments)."""
    tokenizer = load_tokenizer(str(project_path(base)) if project_path(base).exists() else base)
    talks = [row["messages"] for row in sample.rows]
    replies = [m["content"] or "" for talk in talks for m in talk[-1:]]
    lengths = np.array([_tokens(tokenizer, talk) for talk in talks])
    reply_lengths = np.array([len(tokenizer.ids(reply)) for reply in replies])
    positions = _positions(project_path(base))
    wanted = int(np.quantile(lengths, 0.99))
    fitting = [n for n in LENGTHS if not positions or n <= positions] or [positions or LENGTHS[0]]
    max_length = next((n for n in fitting if n >= wanted), fitting[-1])
    turns = float(np.mean([sum(m["role"] == "assistant" for m in talk) for talk in talks]))
    task, graders = _graders(replies, any(m["tool_calls"] for talk in talks for m in talk), turns)
    recipe: dict[str, Any] = {
        "name": f"{name}_lora",
        "dataset": name,
        "extends": "quick",
        "model": {"base": base},
    }
    comments = {
        "extends": "a few updates, to see the whole branch run; then lora",
        "max_length": f"99 % of the first rows have at most {wanted:,} tokens",
        "base": "folder or hub id of the model",
    }
    if "default" not in tokenizer.templates:
        recipe["template"] = {"chat_template": NAMED_TEMPLATES[0]}
        comments["chat_template"] = "the tokenizer has none of its own"
    recipe["tokens"] = {"max_length": max_length}
    if turns > 1.05:
        recipe["tokens"]["supervise"] = "assistant"
        comments["supervise"] = f"rows have {turns:.1f} replies each; completion trains on the last one only"
    if wanted > max_length:
        recipe["tokens"]["overflow"] = "split" if turns > 1.05 else "truncate_answer"
        comments["overflow"] = f"the model has {positions:,} positions"
    recipe["evaluation"] = {"max_new_tokens": int(min(max_length, np.quantile(reply_lengths, 0.99) + 8))}
    if graders:
        recipe["evaluation"]["graders"] = graders
        recipe["evaluation"]["rank_by"] = [graders[-1]["name"], "-val_loss"]
        comments["graders"] = f"the replies look like {task}"
    return recipe, task, comments


def _tokens(tokenizer: Tokenizer, talk: Sequence[dict[str, Any]]) -> int:
    texts = [str(m[n]) for m in talk for n in ("content", "reasoning_content", "tool_calls") if m[n]]
    return sum(len(tokenizer.ids(text)) for text in texts) + TURN_TOKENS * (len(talk) + 1)


def _positions(base: Path) -> int | None:
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError):
        return None
    found = {**config, **config.get("text_config", {})}.get("max_position_embeddings")
    return int(found) if isinstance(found, int) else None


def _graders(replies: Sequence[str], tools: bool, turns: float) -> tuple[str, list[dict[str, Any]]]:
    """(task, graders) by what the final replies look like.

    Args:
        turns: Replies of a row, on average.
    """
    enough = 0.95 * len(replies)
    objects = [value for reply in replies if isinstance(value := _json(reply), dict)]
    if len(objects) >= enough:
        fields = sorted(set.intersection(*(set(o) for o in objects)))
        schema = {"type": "object", "required": fields}
        return "JSON", [
            {"name": "format_pass_rate", "kind": "json_schema", "schema": schema},
            *([{"name": "fields_right", "kind": "json_fields", "fields": fields}] if fields else []),
        ]
    few, short = len(set(replies)) <= min(LABELS, 0.2 * len(replies)), max(map(len, replies)) <= LABELS
    if few and short and turns == 1:
        return "labels", [{"name": "exact", "kind": "exact_match"}]
    if sum(bool(re.search(rf"####\s*{NUMBER}\s*$", r)) for r in replies) >= enough:
        return "numbers", [{"name": "right_number", "kind": "numeric_answer", "after": "####"}]
    if sum(bool(re.search(rf"{NUMBER}\W*$", r)) for r in replies) >= enough:
        return "numbers", [{"name": "right_number", "kind": "numeric_answer"}]
    return ("conversations with tools" if tools else "conversations"), []


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# -- YAML ------------------------------------------------------------------------------------------


def _comments(found: Guess) -> dict[str, str]:
    comments = {"static": "the same files for every snapshot; false: one subfolder per snapshot"}
    if found.source.get("roles"):
        comments["roles"] = "role names of the rows"
    if found.contract:
        comments["contract"] = "so that turns alternate and end with a reply"
    return comments


def _yaml(kind: str, document: dict[str, Any], comments: dict[str, str]) -> str:
    lines = [f"# yaml-language-server: $schema=../schemas/{kind}.json"]
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    for line in text.splitlines():
        key = line.strip().removeprefix("- ").partition(":")[0]
        comment = comments.get(key)
        lines.append(f"{line}  # {comment}" if comment and len(line) < 80 else line)
    return "\n".join(lines) + "\n"

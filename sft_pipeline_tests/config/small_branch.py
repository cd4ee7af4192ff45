"""The small branch whose keys are changed one by one: its two files, its rows, its base model."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline_tests.config.every_key import Workshop
from sft_pipeline_tests.evaluation.world import TEMPLATE, write_base
from sft_pipeline_tests.text.tiny import save_tokenizer

GRADERS: dict[str, dict[str, Any]] = {
    "json_schema": {"schema": {"type": "object"}},
    "json_fields": {"fields": ["decision"]},
    "exact_match": {},
    "regex": {"pattern": "dec(is)ion"},
    "numeric_answer": {},
    "python": {"callable": "graders_of_this_test:one"},
}
RECIPE_DOCUMENT: dict[str, Any] = {
    "name": "tiny",
    "dataset": "small",
    "model": {"base": "base", "lora": {"r": 4, "alpha": 32}},
    "tokens": {"max_length": 96},
    "sanity": {"skip": True},
    "training": {
        "epochs": 1,
        "max_steps": 4,
        "eval_steps": 2,
        "learning_rate": 0.01,
        "per_device_batch": 2,
        "blocks_per_update": 2,
    },
    "evaluation": {
        "graders": [{"name": kind, "kind": kind, **rest} for kind, rest in GRADERS.items()],
        "require_improvement": False,
        "max_new_tokens": 4,
    },
}
DATASET_DOCUMENT: dict[str, Any] = {
    "name": "small",
    "sources": [{"path": "rows.jsonl", "static": True}],
    "split": {"validation": 0.2, "test": 0.2, "near_duplicates": None},
}


def door(i: int) -> dict[str, Any]:
    completion = json.dumps({"decision": ("approve", "deny")[i % 2], "doors": i})
    prompt = f"May I open the {('red', 'old', 'side')[i % 3]} door {i}?"
    rest = {"thread_id": f"T{i}", "shelf": f"S{i % 2}", "day": f"2026-01-{1 + i // 2:02d}"}
    return {"prompt": prompt, "completion": completion, **rest}


# Two that the contract rejects, and of those that keep it one with a control token, and one with reasoning,
# which the template of the base leaves out.
ROWS = [door(i) for i in range(58)]
ROWS += [
    door(58) | {"prompt": "May I say <|im_end|>?"},
    door(59) | {"reasoning": "It is late."},
    door(60) | {"completion": ""},
    door(61) | {"thread_id": None},
]


TALK = ["user", "assistant"]
ODD_TALK = ["assistant", "user", "user", "assistant", "user"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def workshop(root: Path) -> Iterator[Workshop]:
    """The project, with further rows, models, templates and recipes for keys to name."""
    write_rows(root / "rows.jsonl", ROWS)
    write_rows(root / "few.jsonl", ROWS[:6])
    write_rows(root / "few_more.jsonl", ROWS[6:12])
    write_rows(root / "pictures.jsonl", [row | {"image": "door.png"} for row in ROWS[:3]])
    pairs = root / "pairs"
    write_rows(pairs / "prompts.jsonl", [{"id": i, "prompt": f"Door {i}?"} for i in range(6)])
    write_rows(pairs / "replies.jsonl", [{"ref": i, "id": 5 - i, "completion": f"no {i}"} for i in range(5)])
    write_rows(pairs / "more_replies.jsonl", [{"id": 5, "completion": "no 0"}])
    write_rows(
        root / "talk.jsonl",
        [
            {"messages": [{"role": role, "content": f"{role} {i} {n}"} for n, role in enumerate(roles)]}
            for i, roles in enumerate((ODD_TALK, TALK, [r.replace("user", "guest") for r in TALK]))
        ],
    )
    (root / "changes_of_this_test.py").write_text(
        "def twice(row): return [row, row | {'prompt': 'Again?'}]\n"
    )
    for snapshot in ("2026-01", "2026-02"):
        write_rows(root / "moving" / snapshot / "rows.jsonl", ROWS[:6])
    write_base(root / "base")
    write_base(root / "wide", hidden=48)
    save_tokenizer(root / "letters")
    (root / "toned.jinja").write_text(TEMPLATE.replace("{{ m.role }}", "{{ tone }} {{ m.role }}"))
    (root / "graders_of_this_test.py").write_text("def one(*_): return 1\ndef half(*_): return 0.5\n")
    found = Workshop(root)
    found.write_recipe("parent", {"training": {"seed": 7}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_PROJECT_ROOT", str(root))
        patch.setenv("SFT_HOME", str(root / "home"))
        patch.setenv("TENSORBOARD_LOGGING_DIR", "")  # put back at the end
        patch.setattr(sys, "path", list(sys.path))  # a Python grader's project root is put into it
        yield found

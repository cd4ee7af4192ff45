"""Whole branches for tests: a small dataset and its recipe, and what `sft run` made of one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft_pipeline_tests.command import ROOT, Ran, sft_process
from sft_pipeline_tests.network import watched_by

GOOD_ROWS = [
    {
        "thread_id": f"T{i}",
        "prompt": f"Say the number {i} back, please {'again ' * (i % 4)}",
        "completion": f"The number is {i}.",
    }
    for i in range(60)
]
BAD_ROW = {"thread_id": "B1", "prompt": "Say nothing", "completion": ""}
SNAPSHOT = "2026-01-01"
LEARNS: dict[str, Any] = {
    "model": {"base": "data/base_model", "lora": {"dropout": 0}},
    "tokens": {"max_length": 96},
    "training": {
        "max_steps": 24,  # enough to answer every question of the test split; 20 CPU seconds for the branch
        "epochs": 8,
        "eval_steps": 12,
        "learning_rate": 1e-2,
        "blocks_per_update": 4,
        "per_device_batch": 4,
    },
    "evaluation": {
        "graders": [{"name": "says_number", "kind": "regex", "pattern": "The number is"}],
        "gates": ["says_number >= 0.5"],
        "rank_by": ["says_number", "-val_loss"],
        "max_new_tokens": 12,
        "require_improvement": True,
    },
    "export": {"license": "apache-2.0"},
}
SHORT = LEARNS | {  # for tests of what happens around a branch, whatever comes of it
    "training": LEARNS["training"] | {"max_steps": 4, "epochs": 1, "eval_steps": 2},
    "evaluation": LEARNS["evaluation"] | {"gates": [], "require_improvement": False, "max_new_tokens": 4},
}


def write_branch(
    folder: Path,
    rows: list[dict[str, Any]] | bytes | None = None,
    *,
    file: str = "rows.jsonl",
    dataset: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Writes the dataset `small` and the recipe `small_lora`; returns their folder, for SFT_CONFIG_PATH."""
    snapshot = folder / "rows" / SNAPSHOT
    snapshot.mkdir(parents=True, exist_ok=True)
    if not isinstance(rows, bytes):
        rows = "".join(json.dumps(r) + "\n" for r in (GOOD_ROWS if rows is None else rows)).encode()
    (snapshot / file).write_bytes(rows)
    source = {"path": str(folder / "rows"), "columns": {"group": "thread_id"}}
    written = {
        "datasets": {"name": "small", "sources": [source], **(dataset or {})},
        "recipes": {
            "name": "small_lora",
            "dataset": "small",
            "extends": "quick",
            "model": {"base": "data/base_model"},
            **(recipe or {}),
        },
    }
    for kind, value in written.items():
        (folder / kind).mkdir(exist_ok=True)
        (folder / kind / f"{value['name']}.yaml").write_text(yaml.safe_dump(value))
    return folder


@dataclass(frozen=True)
class Finished:
    """A branch that was run to its end.

    Attributes:
        config: Folder for SFT_CONFIG_PATH; None for the embedded branch.
        source: Folder of the snapshot's files.
    """

    dataset: str
    recipe: str
    snapshot: str
    home: Path
    config: Path | None
    source: Path
    ran: Ran

    @property
    def network(self) -> Path:
        """What its processes asked of other machines (`network.entries`)."""
        return self.home.parent / "network.jsonl"

    @property
    def json(self) -> dict[str, Any]:
        assert self.ran.json is not None
        return self.ran.json

    def artifact(self, name: str) -> Path:
        return Path(self.json["artifacts"][name])

    def manifest(self, name: str) -> dict[str, Any]:
        return json.loads((self.artifact(name) / "manifest.json").read_text())


def finish_small(folder: Path) -> Finished:
    config = write_branch(folder / "config", [*GOOD_ROWS, BAD_ROW], recipe=LEARNS)
    return _finish("small", "small_lora", SNAPSHOT, folder / "home", config, config / "rows" / SNAPSHOT)


def finish_demo(folder: Path) -> Finished:
    source = ROOT / "data" / "snapshots" / "access_policy" / "2026-05-20"
    return _finish("access_policy", "access_policy_lora", source.name, folder / "home", None, source)


def _finish(
    dataset: str, recipe: str, snapshot: str, home: Path, config: Path | None, source: Path
) -> Finished:
    watched = watched_by(home.parent / "network.jsonl")
    ran = sft_process("run", recipe, "--json", home=home, config=config, **watched)
    assert ran.code == 0, ran.stderr[-4000:]
    return Finished(dataset, recipe, snapshot, home, config, source, ran)

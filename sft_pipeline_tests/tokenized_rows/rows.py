"""Rows of grouped_split, and artifacts made of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import PartWriter
from sft_pipeline.tables.schemas import ROWS, SPLITS, content_key


def row(
    *messages: tuple[str, str],
    row_id: str = "r",
    weights: Sequence[float | None] = (),
    tools: Any = None,
    calls: Any = None,
) -> dict[str, Any]:
    """A row of grouped_split; `calls` are the last message's tool calls."""
    given = [
        {
            "role": role,
            "content": content,
            "weight": weights[i] if i < len(weights) else None,
            "tool_calls": None,
        }
        for i, (role, content) in enumerate(messages)
    ]
    if calls:
        given[-1]["tool_calls"] = json.dumps(calls)
    given_tools = json.dumps(tools) if tools else None
    return {
        "row_id": row_id,
        "source": 0,
        "file": "rows.jsonl",
        "line": 1,
        "group": row_id,
        "messages": given,
        "tools": given_tools,
        "time": None,
        "warnings": [],
        "content_key": content_key(given, given_tools),
    }


class FakeArtifact(Artifact):
    """A folder that is read like an artifact; config.json and checks.json stand for its manifest."""

    @property
    def manifest(self) -> Any:  # type: ignore[override]
        config, checks = self.path / "config.json", self.path / "checks.json"
        return SimpleNamespace(
            config=json.loads(config.read_text()) if config.is_file() else {},
            checks=json.loads(checks.read_text()) if checks.is_file() else [],
            inputs={},
        )


def split_artifact(folder: Path, **splits: Sequence[dict[str, Any]]) -> Artifact:
    """A grouped_split artifact with the given rows by split."""
    for split in SPLITS:
        with PartWriter(folder / split, ROWS) as out:
            out.append(list(splits.get(split, ())))
    return FakeArtifact(folder)

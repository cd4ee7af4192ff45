"""Branches on small datasets of the test's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

GOOD_ROWS = [
    {
        "thread_id": f"T{i}",
        "prompt": f"Say the number {i} back, please {'again ' * (i % 4)}",
        "completion": f"The number is {i}.",
    }
    for i in range(60)
]


@pytest.fixture
def branch(tmp_path: Path) -> Callable[..., Path]:
    """Writes a dataset and a recipe, both named `small`, and returns their folder for SFT_CONFIG_PATH."""

    def write(
        rows: list[dict[str, Any]] | bytes | None = None,
        *,
        file: str = "rows.jsonl",
        dataset: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> Path:
        snapshot = tmp_path / "rows" / "2026-01-01"
        snapshot.mkdir(parents=True, exist_ok=True)
        content = (
            rows
            if isinstance(rows, bytes)
            else "".join(json.dumps(r) + "\n" for r in (GOOD_ROWS if rows is None else rows)).encode()
        )
        (snapshot / file).write_bytes(content)
        for kind, value in (
            (
                "datasets",
                {
                    "name": "small",
                    "sources": [{"path": str(tmp_path / "rows"), "columns": {"group": "thread_id"}}],
                    **(dataset or {}),
                },
            ),
            (
                "recipes",
                {
                    "name": "small_lora",
                    "dataset": "small",
                    "extends": "quick",
                    "model": {"base": "data/base_model"},
                    **(recipe or {}),
                },
            ),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{value['name']}.yaml").write_text(yaml.safe_dump(value))
        return tmp_path

    return write

"""samples.parquet: every generated reply with its scores."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sft_pipeline.tables.parquet import FileWriter

BASE_COLUMNS = ("side", "model", "step", "row_id", "group", "prompt", "reply", "expected", "finished")


def score_columns(graders: Sequence[str]) -> dict[str, str]:
    """{grader: its column}: the grader's name, with `_score` behind it where another column has that name."""
    return {name: f"{name}_score" if name in BASE_COLUMNS else name for name in graders}


class SamplesWriter:
    """Writes replies in the order in which they are judged.

    Columns: side (validation, test), model (base, checkpoint-<step>), step (int64, null for the base), row_id, group,
    prompt, reply, expected, finished (bool), and one float64 for each grader.
    """

    def __init__(self, path: Path, graders: Sequence[str]) -> None:
        self.columns = score_columns(graders)
        text = [(c, pa.string()) for c in ("side", "model")]
        middle = [
            ("step", pa.int64()),
            *((c, pa.string()) for c in ("row_id", "group", "prompt", "reply", "expected")),
        ]
        self.file = FileWriter(
            path,
            pa.schema(
                [
                    *text,
                    *middle,
                    ("finished", pa.bool_()),
                    *((c, pa.float64()) for c in self.columns.values()),
                ]
            ),
        )

    def keeper(self, side: str, step: int | None) -> Callable[[list[dict[str, Any]]], None]:
        """Takes the samples of one model on one side."""
        model = "base" if step is None else f"checkpoint-{step}"

        def keep(rows: list[dict[str, Any]]) -> None:
            self.file.append(
                [{"side": side, "model": model, "step": step, **_flat(r, self.columns)} for r in rows]
            )

        return keep

    def close(self) -> None:
        self.file.close()


def _flat(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {
        **{k: v for k, v in row.items() if k != "scores"},
        **{columns[g]: s for g, s in row["scores"].items()},
    }

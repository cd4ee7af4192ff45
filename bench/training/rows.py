"""The rows, once: packed shards and an update plan, which all sides read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from training.setting import Setting

SHORTEST = 24
EVENNESS = 4.0  # of the Dirichlet distribution that divides a block: lengths vary by about 40 %
IGNORED = -100

INTS = pa.list_(pa.int32())
BLOCKS = pa.schema(
    [
        ("block", pa.int32()),
        ("input_ids", INTS),
        ("labels", INTS),
        ("position_ids", INTS),
        ("lengths", INTS),
        ("row_ids", pa.list_(pa.string())),
    ]
)
PLAN = pa.schema([("update", pa.int32()), ("position", pa.int32()), ("block", pa.int32())])


def write(setting: Setting, updates: int, folder: Path) -> dict[str, float]:
    """Writes `train.parquet` and `plan.parquet`.

    Every block is full and holds the same number of examples, so that packing wastes nothing and that padded batches of
    so many examples make the very same updates.

    Returns:
        tokens and supervised (positions that are scored), per update.
    """
    blocks = list(_blocks(setting, updates * setting.blocks))
    pq.write_table(pa.Table.from_pylist(blocks, schema=BLOCKS), folder / "train.parquet", row_group_size=16)
    plan = [
        {"update": i // setting.blocks, "position": i % setting.blocks, "block": i}
        for i in range(len(blocks))
    ]
    pq.write_table(pa.Table.from_pylist(plan, schema=PLAN), folder / "plan.parquet")
    return {
        "tokens": float(setting.tokens * setting.blocks),
        "supervised": sum(t != IGNORED for b in blocks for t in b["labels"]) / updates,
    }


def _blocks(setting: Setting, count: int) -> Iterator[dict[str, Any]]:
    draw = np.random.default_rng(setting.seed)
    for number in range(count):
        lengths = _lengths(draw, setting)
        ids = draw.integers(3, setting.vocabulary, setting.tokens)
        labels = np.concatenate(
            [np.arange(n) >= n - max(1, round(n * setting.supervised)) for n in lengths]
        ) * (ids - IGNORED) + (IGNORED)
        yield {
            "block": number,
            "input_ids": ids,
            "labels": labels,
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "lengths": lengths,
            "row_ids": [f"{number}.{i}" for i in range(len(lengths))],
        }


def _lengths(draw: np.random.Generator, setting: Setting) -> np.ndarray:
    """Lengths of a block's examples, which sum to its size."""
    shortest = min(SHORTEST, setting.tokens // setting.examples)
    spare = setting.tokens - shortest * setting.examples
    cuts = np.floor(np.cumsum(draw.dirichlet([EVENNESS] * setting.examples)) * spare + 1e-6).astype(int)
    return shortest + np.diff(cuts, prepend=0)


def padded(blocks: list[dict[str, Any]], setting: Setting) -> list[dict[str, Any]]:
    """The examples one by one, update by update, longest first within an update: what grouping by length aims at."""
    found = []
    for start in range(0, len(blocks), setting.blocks):
        examples = [e for block in blocks[start : start + setting.blocks] for e in _examples(block)]
        found += sorted(examples, key=lambda e: -len(e["input_ids"]))
    return found


def _examples(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
    start = 0
    for length in block["lengths"]:
        yield {name: block[name][start : start + length] for name in ("input_ids", "labels")}
        start += length


def packed(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as TRL's collator reads them."""
    return [{"input_ids": b["input_ids"], "labels": b["labels"], "seq_lengths": b["lengths"]} for b in blocks]

"""What is trained: a randomly initialised Llama-style model, and the shards and update plan that all read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARIES = {"1k": 1_024, "49k": 49_152, "152k": 151_936}
KINDS = ("lora", "full")
SHORTEST = 24
EVENNESS = 4.0  # of the Dirichlet distribution that divides a block: lengths vary by about 40 %
IGNORED = -100

INTS = pa.list_(pa.int32())
BLOCKS = pa.schema(
    [
        ("block", pa.int32()),
        ("input_ids", INTS),
        ("labels", INTS),
        ("weights", pa.list_(pa.float32())),
        ("position_ids", INTS),
        ("seq_lengths", INTS),
        ("row_ids", pa.list_(pa.string())),
    ]
)
PLAN = pa.schema([("update", pa.int32()), ("position", pa.int32()), ("block", pa.int32())])


@dataclass(frozen=True)
class Setting:
    """One model and one way of training it. The rows follow from it (`write_rows`).

    Attributes:
        name: As the report calls it.
        parameterization: "lora" or "full".
        tied: The output projection is the embedding's transpose, as in the 1B of the family.
        tokens: In a block: a micro-batch of the packed systems, on average one of the padded ones.
        examples: In a block.
        supervised: Share of an example's tokens that is scored.
        blocks: In an update, hence the steps of gradient accumulation where a micro-batch is a block.
        precision: "fp32" or "bf16".
        checkpointing: Activations are computed again in the backward pass, in all systems.
    """

    name: str
    parameterization: str
    vocabulary: int
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 1_024
    tied: bool = False
    tokens: int = 2_048
    examples: int = 8
    supervised: float = 0.3
    blocks: int = 2
    precision: str = "fp32"
    checkpointing: bool = False
    seed: int = 42

    @property
    def wide(self) -> bool:
        """Whether the vocabulary is one where the output projection dominates."""
        return self.vocabulary >= VOCABULARIES["49k"]


def cpu_settings(vocabularies: list[str], kinds: list[str], hidden: int, tokens: int) -> list[Setting]:
    """The small model, once per vocabulary and kind."""
    return [
        Setting(
            f"{name}, {kind}", kind, VOCABULARIES[name], hidden=hidden, intermediate=4 * hidden, tokens=tokens
        )
        for name in vocabularies
        for kind in kinds
    ]


def gpu_settings(hidden: int | None, tokens: int | None) -> list[Setting]:
    """The 1B and 8B of the Llama 3 family, 4,096 tokens, bf16.

    Args:
        hidden: Another width with 4 layers, to try the code on a small device or none.
        tokens: Another size of a block.
    """
    base = Setting("", "lora", vocabulary=128_256, heads=32, kv_heads=8, tokens=4_096, precision="bf16")
    one = replace(base, hidden=2_048, layers=16, intermediate=8_192, tied=True)
    eight = replace(base, hidden=4_096, layers=32, intermediate=14_336, checkpointing=True)
    found = [
        replace(one, name="1B, lora"),
        replace(one, name="1B, full", parameterization="full"),
        replace(eight, name="8B, lora"),
    ]
    if hidden:
        small = replace(
            base, vocabulary=4_096, hidden=hidden, intermediate=4 * hidden, layers=4, heads=4, kv_heads=2
        )
        found = [
            replace(
                small,
                name=f"{s.name} at hidden {hidden}",
                parameterization=s.parameterization,
                tied=s.tied,
                checkpointing=s.checkpointing,
            )
            for s in found
        ]
    return [replace(s, tokens=tokens) for s in found] if tokens else found


def write_rows(setting: Setting, updates: int, folder: Path) -> dict[str, float]:
    """Writes `train.parquet` and `plan.parquet`.

    Every block is full and holds the same number of examples, so that packing wastes nothing and that padded
    batches of so many examples make the very same updates.

    Returns:
        tokens and supervised (positions that are scored), per update.
    """
    blocks = list(_blocks(setting, updates * setting.blocks))
    pq.write_table(pa.Table.from_pylist(blocks, schema=BLOCKS), folder / "train.parquet", row_group_size=16)
    plan = [
        {"update": i // setting.blocks + 1, "position": i % setting.blocks, "block": i}
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
            "weights": None,
            "position_ids": np.concatenate([np.arange(n) for n in lengths]),
            "seq_lengths": lengths,
            "row_ids": [f"{number}.{i}" for i in range(len(lengths))],
        }


def _lengths(draw: np.random.Generator, setting: Setting) -> np.ndarray:
    """Lengths of a block's examples, which sum to its size."""
    shortest = min(SHORTEST, setting.tokens // setting.examples)
    spare = setting.tokens - shortest * setting.examples
    cuts = np.floor(np.cumsum(draw.dirichlet([EVENNESS] * setting.examples)) * spare + 1e-6).astype(int)
    return shortest + np.diff(cuts, prepend=0)


def padded(blocks: list[dict[str, Any]], setting: Setting) -> list[dict[str, Any]]:
    """The examples, update by update, longest first within an update: what grouping by length aims at."""
    found = []
    for start in range(0, len(blocks), setting.blocks):
        examples = [e for block in blocks[start : start + setting.blocks] for e in _examples(block)]
        found += sorted(examples, key=lambda e: -len(e["input_ids"]))
    return found


def _examples(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
    start = 0
    for length in block["seq_lengths"]:
        yield {name: block[name][start : start + length] for name in ("input_ids", "labels")}
        start += length


def packed(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as TRL's collator reads them."""
    return [
        {"input_ids": b["input_ids"], "labels": b["labels"], "seq_lengths": b["seq_lengths"]} for b in blocks
    ]

"""What every training and trial needs before its first update: determinism, the tokenizer, the feed, a sampler."""

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sft_pipeline.hub import clear_loading_errors
from sft_pipeline.training.base import tokenizer_folder
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.feed import Feed, Layout
from sft_pipeline.training.generate import generate
from sft_pipeline.training.shards import Plan, Shards
from sft_pipeline.training.threads import threads_for

SAMPLES, SAMPLE_TOKENS = 3, 96


def be_deterministic(seed: int) -> None:
    """Seeds every generator and asks for deterministic kernels, where there are any."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_tokenizer(config: ModelConfig) -> Any:
    """The recipe's tokenizer.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(config)
    with clear_loading_errors(f"the tokenizer {config.tokenizer or config.base}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def make_feed(
    shards: Shards,
    plan: Plan,
    training: TrainingConfig,
    *,
    layout: Layout,
    updates: int,
    rank: int = 0,
    world: int = 1,
) -> Feed:
    """A rows micro-batch may hold as many padded tokens as a packed one would: per_device_batch of the longest block."""
    longest = max((len(shards.block(int(b)).input_ids) for b in plan.blocks(0)), default=1)
    return Feed(
        shards,
        plan,
        layout,
        training.per_device_batch,
        max_tokens=training.per_device_batch * longest,
        updates=updates,
        rank=rank,
        world=world,
    )


def sample_rows(parts: list[Path], count: int) -> list[dict[str, Any]]:
    """`count` tokenized rows, spread over the first row group: always the same ones."""
    for part in parts:
        file = pq.ParquetFile(part, memory_map=True)
        if file.metadata.num_rows:
            table = file.read_row_group(0, columns=["input_ids", "prompt_length", "completion"])
            at = sorted(
                {
                    round(i * (table.num_rows - 1) / max(1, count - 1))
                    for i in range(min(count, table.num_rows))
                }
            )
            return table.take(at).to_pylist()
    return []


def stop_ids(formatting: Mapping[str, Any]) -> set[int]:
    """Ids that end a turn, as the tokenized stage recorded them."""
    found: set[int] = set()
    for key in ("stop_token_ids", "stop_ids", "stop_token_id", "eos_token_id"):
        value = formatting.get(key)
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, list):
            found |= {int(v) for v in value}
    return found


def make_sampler(
    model: Any,
    tokenizer: Any,
    parts: list[Path],
    formatting: Mapping[str, Any],
    count: int,
    new_tokens: int = SAMPLE_TOKENS,
) -> Callable[[], list[dict[str, Any]]]:
    """Replies of the model as it is now to a few fixed held-out prompts."""
    rows = sample_rows(parts, count)
    prompts = [r["input_ids"][: r["prompt_length"]] for r in rows]
    ends = stop_ids(formatting)

    def sample() -> list[dict[str, Any]]:
        with threads_for(model):
            replies = generate(
                model,
                prompts,
                max_new_tokens=new_tokens,
                stop_ids=ends,
                pad_id=min(ends, default=0),
                batch_size=max(1, count),
            )
        return [
            {
                "prompt": tokenizer.decode(p),
                "reply": tokenizer.decode(r.ids),
                "expected": row["completion"],
                "finished": r.finished,
            }
            for p, r, row in zip(prompts, replies, rows, strict=True)
        ]

    return sample

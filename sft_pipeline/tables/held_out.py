"""Held-out rows of a split: which are generated, and reading them."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_pipeline.errors import InputError
from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import read_batches


@dataclass(frozen=True)
class HeldOutRow:
    """One tokenized row of a validation or test split.

    Attributes:
        position: Its number in the split, from 0.
        row_id, group: As in the schema TOKENIZED.
        prompt: Ids of the prompt that a server would send.
        target: Ids that follow the prompt in the row: what a model is trained on, or would have been.
        completion: The text that is expected as the reply; "" where it is tool calls alone.
    """

    position: int
    row_id: str
    group: str
    prompt: list[int]
    target: list[int]
    completion: str


def chosen_positions(parts: Sequence[Path], limit: int | None) -> list[int]:
    """The rows of a split for which replies are generated, in their order: all, or `limit` of them.

    The sample is the rows with the smallest SHA-256 of their row_id: the same for every checkpoint and every
    recipe with this limit, and mostly the same in a later snapshot. Further parts of a row that was split
    ("<row_id>/1") begin in the middle of it: nobody would send that as a prompt, so they are left out.
    """
    position = 0
    keyed: list[tuple[bytes, int]] = []
    for batch in read_batches(parts, ["row_id"]):
        for row_id in batch.column(0).to_pylist():
            if "/" not in row_id:
                keyed.append((hashlib.sha256(row_id.encode()).digest(), position))
            position += 1
        if limit is not None and len(keyed) > 4 * limit + 10_000:  # so that memory stays bounded
            keyed = heapq.nsmallest(limit, keyed)
    if limit is not None:
        keyed = heapq.nsmallest(limit, keyed)
    return sorted(p for _, p in keyed)


def held_out_rows(parts: Sequence[Path], positions: Sequence[int]) -> Iterator[HeldOutRow]:
    """The rows at these ascending positions."""
    wanted = iter(positions)
    following = next(wanted, None)
    start = 0
    for batch in read_batches(parts, ["row_id", "group", "input_ids", "prompt_length", "completion"]):
        while following is not None and following < start + batch.num_rows:
            row = batch.slice(following - start, 1).to_pylist()[0]
            ids, n = row["input_ids"], row["prompt_length"]
            yield HeldOutRow(following, row["row_id"], row["group"], ids[:n], ids[n:], row["completion"])
            following = next(wanted, None)
        start += batch.num_rows


def probe_rows(tokenized: Artifact, count: int) -> list[HeldOutRow]:
    """A few rows of the first split that has any, test first: always the same ones.

    Raises:
        InputError: No split has a row.
    """
    for split in ("test", "validation", "train"):
        parts = tokenized.parts(split)
        if rows := list(held_out_rows(parts, chosen_positions(parts, count))):
            return rows
    raise InputError(f"{tokenized.manifest.asset} has no rows to compare models with")

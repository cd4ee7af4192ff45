"""Reads what is to be shown from the artifacts."""

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.errors import InputError
from sft_pipeline.inspection.view import IGNORE, BlockView, Inspection, RowView, Segment
from sft_pipeline.stages.tables import read_batches
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer, load_tokenizer
from sft_pipeline.store import Artifact

SIDES = ("train", "validation", "test")


def inspect_rows(
    tokenized: Artifact,
    packed: Artifact | None,
    *,
    row: str | None = None,
    n: int = 3,
    side: str = "train",
    tokenizer: Tokenizer | None = None,
) -> Inspection:
    """Looks up rows and the blocks that hold them.

    Args:
        packed: The `packed_shards` made of `tokenized`; None shows rows only.
        row: A row id, or the beginning of one, searched on all sides; None takes the first `n` of `side`.
        n: How many rows at most.
        tokenizer: By default the one that the artifact was made with.

    Raises:
        InputError: No row has this id, or the tokenizer's files are gone.
    """
    config = tokenized.manifest.config if tokenizer is None else {}
    tokenizer = tokenizer or load_tokenizer(config["tokenizer"], config["revision"])
    found = _find(tokenized, row, n, side)
    if row is not None and not found:
        where = _rejected(tokenized, row)
        raise InputError(
            f"no tokenized row has an id that begins with {row}"
            + (f": it was rejected here ({where})" if where else "")
        )
    rows: list[RowView] = []
    blocks: list[BlockView] = []
    for place, values in found:
        block = _block_of(packed, place, values["row_id"]) if packed is not None and place != "test" else None
        rows.append(_view(tokenizer, place, values, None if block is None else block.block))
        if block is not None and all(b.block != block.block for b in blocks):
            blocks.append(block)
    return Inspection(_title(tokenized), rows, blocks)


def _title(tokenized: Artifact) -> str:
    recorded = json.loads(tokenized.file("formatting.json").read_text(encoding="utf-8"))
    return f"template {recorded['template_name']} ({recorded['template_sha256'][:8]}), supervise: {recorded['mask']['supervise']}"


def _find(tokenized: Artifact, row: str | None, n: int, side: str) -> list[tuple[str, dict]]:
    if row is None:
        rows = (
            values
            for batch in read_batches(tokenized.parts(side), batch_rows=max(n, 1))
            for values in batch.to_pylist()
        )
        return [(side, values) for _, values in zip(range(n), rows, strict=False)]
    found: list[tuple[str, dict]] = []
    for place in SIDES:
        for batch in read_batches(tokenized.parts(place)):
            matches = batch.filter(pc.starts_with(batch.column("row_id"), row))
            found += [(place, values) for values in matches.to_pylist()]
            if len(found) >= n:
                return found[:n]
    return found


def _rejected(tokenized: Artifact, row: str) -> str:
    for batch in read_batches([tokenized.file("rejects.parquet")], ["row_id", "reasons"]):
        for values in batch.filter(pc.starts_with(batch.column("row_id"), row)).to_pylist():
            return ", ".join(values["reasons"])
    return ""


def _view(tokenizer: Tokenizer, side: str, values: dict, block: int | None) -> RowView:
    return RowView(
        row_id=values["row_id"],
        group=values["group"],
        side=side,
        tokens=tokenizer.decode_batch([[i] for i in values["input_ids"]]),
        input_ids=values["input_ids"],
        labels=values["labels"],
        special=[i in tokenizer.control_ids for i in values["input_ids"]],
        prompt_length=values["prompt_length"],
        truncated=values["truncated"],
        completion=values["completion"],
        block=block,
    )


def _block_of(packed: Artifact, side: str, row_id: str) -> BlockView | None:
    """The block that holds a row. Reads only ids until it is found."""
    max_length = int(packed.manifest.config["max_length"])
    for batch in read_batches(packed.parts(side), ["block", "row_ids", "lengths", "labels"], batch_rows=256):
        at = _index_of(batch.column("row_ids"), row_id)
        if at is not None:
            return _block(batch.slice(at, 1).to_pylist()[0], max_length)
    return None


def _index_of(row_ids: pa.ListArray, row_id: str) -> int | None:
    place = pc.index(row_ids.flatten(), row_id).as_py()
    return (
        None
        if place < 0
        else int(
            np.searchsorted(row_ids.offsets.to_numpy() - row_ids.offsets[0].as_py(), place, side="right")
        )
        - 1
    )


def _block(values: dict, max_length: int) -> BlockView:
    return BlockView(values["block"], list(_segments(values)), max_length)


def _segments(values: dict) -> Iterator[Segment]:
    start = 0
    for row_id, length in zip(values["row_ids"], values["lengths"], strict=True):
        labels = values["labels"][start : start + length]
        yield Segment(row_id, length, sum(label != IGNORE for label in labels))
        start += length

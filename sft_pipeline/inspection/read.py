"""Reads rows and blocks from the artifacts."""

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sft_pipeline.errors import InputError
from sft_pipeline.inspection.view import BlockView, Inspection, RowView, Segment
from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import read_batches
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer

PACKED_SPLITS = ("train", "validation")
SPLITS = (*PACKED_SPLITS, "test")
PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what incomplete bytes decode to
BLOCK_COLUMNS = ["block", "row_ids", "seq_lengths", "labels", "position_ids"]
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens


def inspect_rows(
    tokenized: Artifact,
    packed: Artifact | None,
    *,
    row: str | None = None,
    n: int = 3,
    split: str = "train",
    tokenizer: Tokenizer | None = None,
) -> Inspection:
    """Looks up rows and the blocks that hold them.

    Args:
        packed: The `packed_shards` made of `tokenized`; None shows rows only.
        row: A row id, or the beginning of one, searched in all splits; None takes the first `n` of `split`.
        n: How many rows at most.
        tokenizer: By default the one that the artifact was made with.

    Raises:
        InputError: No row has this id, or the tokenizer's files are gone.
    """
    config = tokenized.manifest.config
    overflow = config["tokens"]["overflow"]
    tokenizer = tokenizer or load_tokenizer(config["tokenizer"], config["revision"])
    found = _find(tokenized, row, n, split)
    if row is not None and not found:
        where = _rejected(tokenized, row)
        raise InputError(
            f"no tokenized row has an id that begins with {row}"
            + (f": it was rejected here ({where})" if where else "")
        )
    blocks: dict[tuple[str, str], BlockView] = {}
    if packed is not None:
        for packed_split in PACKED_SPLITS:
            ids = {values["row_id"] for at, values in found if at == packed_split}
            blocks |= {(packed_split, i): b for i, b in _blocks_of(packed, packed_split, ids).items()}
    rows = [
        _view(tokenizer, at, values, overflow, blocks.get((at, values["row_id"]))) for at, values in found
    ]
    held_by = {(r.split, r.block): blocks[r.split, r.row_id] for r in rows if r.block is not None}
    return Inspection(_title(tokenized), rows, list(held_by.values()))


def _title(tokenized: Artifact) -> str:
    recorded = json.loads(tokenized.file("formatting.json").read_text(encoding="utf-8"))
    mask = recorded["mask"]
    return (
        f"template {recorded['template_name']} ({recorded['template_sha256'][:8]}), "
        f"supervise: {mask['supervise']}, max_length: {mask['max_length']}, overflow: {mask['overflow']}"
    )


def _find(tokenized: Artifact, row: str | None, n: int, split: str) -> list[tuple[str, dict]]:
    if row is None:
        rows = (
            values
            for batch in read_batches(tokenized.parts(split), batch_rows=max(n, 1))
            for values in batch.to_pylist()
        )
        return [(split, values) for _, values in zip(range(n), rows, strict=False)]
    found: list[tuple[str, dict]] = []
    for searched in SPLITS:
        for batch in read_batches(tokenized.parts(searched)):
            matches = batch.filter(pc.starts_with(batch.column("row_id"), row))
            found += [(searched, values) for values in matches.to_pylist()]
            if len(found) >= n:
                return found[:n]
    return found


def _rejected(tokenized: Artifact, row: str) -> str:
    for batch in read_batches([tokenized.file("rejects.parquet")], ["row_id", "reasons"]):
        for values in batch.filter(pc.starts_with(batch.column("row_id"), row)).to_pylist():
            return ", ".join(values["reasons"])
    return ""


def _view(tokenizer: Tokenizer, split: str, values: dict, overflow: str, block: BlockView | None) -> RowView:
    return RowView(
        row_id=values["row_id"],
        group=values["group"],
        split=split,
        tokens=token_texts(tokenizer, values["input_ids"]),
        input_ids=values["input_ids"],
        labels=values["labels"],
        weights=values["weights"],
        special=[i in tokenizer.control_ids for i in values["input_ids"]],
        prompt_length=values["prompt_length"],
        truncated=values["truncated"],
        completion=values["completion"],
        overflow=overflow,
        block=None if block is None else block.block,
    )


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, so that the texts together are the text of the row.

    A token alone may decode to something else: some tokenizers drop a leading space there, and a token may be
        a part
    of a character only. Such a character's text goes to its last token; the others are empty.
    """
    texts: list[str] = []
    # ids[:known] have given their text; ids[begin:known] are the context that the next ones need.
    known = begin = 0
    for end in range(1, len(ids) + 1):
        before, now = tokenizer.decode(ids[begin:known]), tokenizer.decode(ids[begin:end])
        whole = not now.endswith(PARTIAL) or end == len(ids) or end - known == LONGEST_CHARACTER
        texts.append(now[len(before) :] if whole else "")
        if whole:
            begin, known = known, end
    return texts


def _blocks_of(packed: Artifact, split: str, row_ids: set[str]) -> dict[str, BlockView]:
    """{row id: its block}. Reads only ids where no row is wanted, and stops when all are found."""
    wanted = pa.array(row_ids, pa.string())
    max_length = int(packed.manifest.config["max_length"])
    found: dict[str, BlockView] = {}
    for part in packed.parts(split):
        with pq.ParquetFile(part) as file:
            for group in range(file.num_row_groups):
                if len(found) == len(row_ids):
                    return found
                ids = file.read_row_group(group, ["row_ids"]).column("row_ids").combine_chunks()
                holds = pc.list_parent_indices(ids).filter(pc.is_in(ids.flatten(), wanted)).unique()
                if len(holds):
                    for values in file.read_row_group(group, BLOCK_COLUMNS).take(holds).to_pylist():
                        block = BlockView(values["block"], split, list(_segments(values)), max_length)
                        found |= {s.row_id: block for s in block.segments if s.row_id in row_ids}
    return found


def _segments(values: dict) -> Iterator[Segment]:
    start = 0
    for row_id, length in zip(values["row_ids"], values["seq_lengths"], strict=True):
        stop = start + length
        supervised = sum(label != IGNORE_LABEL for label in values["labels"][start:stop])
        positions = values["position_ids"]
        yield Segment(row_id, length, supervised, positions[start], positions[stop - 1])
        start = stop

"""The data against the model: labels, vocabulary, positions, formatting. No weights are needed."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.reporting import Reporter
from sft_pipeline.tables.parquet import count_rows
from sft_pipeline.tables.schemas import IGNORE_LABEL

MOST, FULLEST = 20, 64
COLUMNS = ["block", "input_ids", "labels", "seq_lengths", "row_ids"]


@dataclass
class DataFindings:
    """Counts over every block of every split, and the first offending rows.

    Attributes:
        longest: Tokens of the longest example.
        without_supervision: Examples.
        fullest: Training blocks, the longest first, of equally long ones the most supervised.
        offenders: Rows with an id outside the vocabulary or a wrong label.
    """

    tokens: int = 0
    supervised: int = 0
    outside_vocabulary: int = 0
    mismatched_labels: int = 0
    longest: int = 0
    highest_id: int = -1
    without_supervision: int = 0
    fullest: list[int] = field(default_factory=list)
    offenders: list[dict[str, Any]] = field(default_factory=list)


def check_blocks(parts: Mapping[str, Sequence[Path]], vocabulary: int, report: Reporter) -> DataFindings:
    """Reads all blocks, one row group at a time.

    Args:
        parts: Parquet parts by split.
        vocabulary: Rows of the model's embedding.
    """
    found = DataFindings()
    sizes: list[tuple[int, int, int]] = []
    total = sum(count_rows(paths) for paths in parts.values())
    done = 0
    for split, paths in parts.items():
        for path in paths:
            file = pq.ParquetFile(path, memory_map=True)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=COLUMNS).combine_chunks()
                if table.num_rows:
                    _check(table, split, vocabulary, found)
                    if split == "train":
                        sizes = heapq.nlargest(FULLEST, sizes + _sizes(table))
                done += table.num_rows
                report.progress("checking blocks", done, total, "blocks")
    found.fullest = [-block for _, _, block in sizes]
    return found


def _sizes(table: pa.Table) -> list[tuple[int, int, int]]:
    """(tokens, supervised, minus the number) of the fullest blocks of a row group."""
    labels = table["labels"].chunk(0)
    lengths = labels.value_lengths().to_numpy()
    ends = np.cumsum(lengths)
    supervised = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORE_LABEL)])
    counts = supervised[ends] - supervised[ends - lengths]
    numbers = table["block"].to_numpy()
    chosen = np.lexsort((-numbers, counts, lengths))[-FULLEST:]
    # Minus the number, so that of equally full blocks the first is the largest.
    return [(int(lengths[i]), int(counts[i]), -int(numbers[i])) for i in chosen]


def _check(table: pa.Table, split: str, vocabulary: int, found: DataFindings) -> None:
    lists = {name: table[name].chunk(0) for name in ("input_ids", "labels", "seq_lengths", "row_ids")}
    ids, labels = (lists[n].flatten().to_numpy() for n in ("input_ids", "labels"))
    starts = np.concatenate([[0], np.cumsum(lists["input_ids"].value_lengths().to_numpy())])
    supervised = labels != IGNORE_LABEL
    outside = (ids < 0) | (ids >= vocabulary)
    wrong = supervised & (labels != ids)
    lengths = lists["seq_lengths"].flatten().to_numpy()
    found.tokens += len(ids)
    found.supervised += int(supervised.sum())
    found.outside_vocabulary += int(outside.sum())
    found.mismatched_labels += int(wrong.sum())
    found.longest = max(found.longest, int(lengths.max(initial=0)))
    found.highest_id = max(found.highest_id, int(ids.max(initial=-1)))
    example_starts = np.concatenate([[0], np.cumsum(lengths)])
    if len(lengths) and example_starts[-1] == len(labels):
        found.without_supervision += int(
            (np.add.reduceat(supervised, example_starts[:-1], dtype=np.int64) == 0).sum()
        )
    # Converted to Python only where something is wrong: that costs more than all the rest.
    row_ids = (
        lists["row_ids"].flatten().to_pylist()
        if (outside.any() or wrong.any()) and len(found.offenders) < MOST
        else []
    )
    for at in np.flatnonzero(outside | wrong)[: MOST - len(found.offenders)] if row_ids else []:
        example = int(np.searchsorted(example_starts, at, side="right")) - 1
        block = int(np.searchsorted(starts, at, side="right")) - 1
        found.offenders.append(
            {
                "side": split,
                "block": int(table["block"][block].as_py()),
                "row_id": row_ids[example] if example < len(row_ids) else "",
                "position": int(at - starts[block]),
                "input_id": int(ids[at]),
                "label": int(labels[at]),
                "why": "outside the vocabulary" if outside[at] else "label is not the input id",
            }
        )


def changed_formatting(
    recorded: Mapping[str, Any],
    tokenizer: str,
    revision: str | None,
    template: Mapping[str, Any],
    tokens: Mapping[str, Any],
) -> list[str]:
    """What has changed since the rows were made: in words, empty where nothing has.

    The tokenizer, template and mask of the recipe are fingerprinted as tokenized_rows does it, and compared
    with formatting.json.
    """
    from sft_pipeline.store.files import sha256_json
    from sft_pipeline.text.find_template import load_template
    from sft_pipeline.text.tokenizer import load_tokenizer

    now = load_tokenizer(tokenizer, revision)
    current = {
        "tokenizer": now.sha256,
        "template": load_template(template["chat_template"], now, template["variables"]).sha256,
        "mask": sha256_json({**tokens, "system": template["system"]}),
    }
    return [
        f"the {what} changed after tokenization"
        for what, digest in current.items()
        if recorded.get(f"{what}_sha256") != digest
    ]

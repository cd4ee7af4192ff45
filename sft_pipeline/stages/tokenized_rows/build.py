"""Builds tokenized_rows from grouped_split: every row rendered, tokenized, masked, checked, and written."""

import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tokenized_rows.batch_encoder import (
    BatchEncoder,
    EncodedBatch,
    FastPathDiffers,
    reject_rows,
)
from sft_pipeline.stages.tokenized_rows.checks import checks
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.formatting import formatting_of
from sft_pipeline.stages.tokenized_rows.outcomes import OUTCOMES, OUTCOMES_FILE
from sft_pipeline.stages.tokenized_rows.report import evidence
from sft_pipeline.stages.tokenized_rows.row_cache import RowCache
from sft_pipeline.stages.tokenized_rows.served_prompts import PromptSample, find_skew, known_skew
from sft_pipeline.stages.tokenized_rows.stats import StageStats
from sft_pipeline.stages.workers import ordered_map, threaded_map, worker_count
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.parquet import BackgroundWriter, FileWriter, PartWriter, count_rows, read_batches
from sft_pipeline.tables.schemas import REJECTS, SPLITS, TOKENIZED

BATCH = 4_096
COMPARED = 2_000  # rows encoded both ways, at least; where there are not twice as many, all go row by row
WORTH_PROCESSES = (
    8_000  # new rows; a worker process first imports and loads the tokenizer, which takes a second
)
_COLUMNS = ["row_id", "source", "file", "line", "group", "messages", "tools", "content_key"]


@dataclass(frozen=True)
class Batch:
    """A batch of one split.

    Attributes:
        found: int64 (rows,), the row of the earlier builds that is the same (-1: none).
        new: The rows that have none.
        compared: bool (new rows,), which of them are encoded both ways where they are encoded as columns.
    """

    split: str
    rows: pa.RecordBatch
    found: npt.NDArray[np.int64]
    new: pa.RecordBatch
    compared: npt.NDArray[np.bool_]


def build(b: Build) -> Built:
    """Renders, tokenizes and masks every row of every split; rejects.parquet has the others, with reasons."""
    config: TokenizedRowsConfig = b.config
    encoder, sample = BatchEncoder(config, fast=True), PromptSample()
    try:
        stats = _encode_all(b, encoder, sample)
    except FastPathDiffers as row:
        why = f"the fast encoder differs from the reference, for example on row {row}"
        b.report.log(f"tokenized_rows: {why}; all rows are encoded by the reference", "warning")
        encoder, sample = BatchEncoder(config, fast=False), PromptSample()
        stats = _encode_all(b, encoder, sample)
        stats.why_not_fast = why
    skew = known_skew(b.earlier) or find_skew(encoder.tokenizer, encoder.template, sample.conversations)
    for reason, count in stats.reasons.most_common():
        b.report.log(f"tokenized_rows: {count} rows rejected: {reason}", "warning")
    n = stats.numbers
    on_disk = {split: count_rows(sorted((b.out / split).glob("*.parquet"))) for split in SPLITS}
    rejected_on_disk = count_rows([b.out / "rejects.parquet"])
    formatting = formatting_of(config, encoder.tokenizer, encoder.template) | {"counts": stats.summed_up()}
    write_json(b.out / "formatting.json", formatting)
    return Built(
        counts={
            "rows_read": n["rows"],
            "rows_accepted": n["accepted"],
            "rows_rejected": n["rejected"],
            "rows_written": sum(on_disk.values()),
            "rows_tokenized": n["tokenized"],
            "rows_reused": n["reused"],
            **on_disk,
            **{
                name: n[name] for name in ("tokens", "supervised_tokens", "truncated", "split", "neutralised")
            },
            **{name: n[name] for name in ("turns_not_supervised", "by_columns", "by_rows", "compared")},
        },
        checks=checks(stats, sample, skew, formatting, on_disk, rejected_on_disk),
        volatile=("plots/",),
        evidence=evidence(stats, formatting, config, encoder.tokenizer, b.out),
    )


def _encode_all(b: Build, encoder: BatchEncoder, sample: PromptSample) -> StageStats:
    """Writes every split, the rejects and the outcomes.

    Raises:
        FastPathDiffers: A row that was encoded both ways came out differently.
    """
    parts = {split: b.inputs["grouped_split"].parts(split) for split in SPLITS}
    total, done, stats = count_rows(chain(*parts.values())), 0, StageStats()
    for split in SPLITS:  # what an attempt before this one has written
        shutil.rmtree(b.out / split, ignore_errors=True)
    scratch = b.work / "row_cache"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        keys = read_batches(chain(*parts.values()), ["content_key"]) if b.earlier else ()
        cache = RowCache(b.earlier, [batch.column(0) for batch in keys], scratch)
        new = total - int(np.count_nonzero(cache.found >= 0))
        encoder.fast &= new >= 2 * COMPARED
        splits = {
            split: stack.enter_context(PartWriter(b.out / split, TOKENIZED, row_group=BATCH, of_tokens=True))
            for split in SPLITS
        }
        rejects = stack.enter_context(FileWriter(b.out / "rejects.parquet", REJECTS))
        outcomes = stack.enter_context(FileWriter(b.out / OUTCOMES_FILE, OUTCOMES))
        background = stack.enter_context(BackgroundWriter())
        batches = _batches(parts, cache, total, every=max(new // COMPARED, 1))
        for batch, encoded in stack.enter_context(closing(_encode(encoder, batches, new))):
            whole = cache.merge(batch.found, batch.rows, encoded)
            background.submit(splits[batch.split].write, whole.examples)
            background.submit(outcomes.write, whole.outcomes)
            rejected = reject_rows(batch.rows, whole.outcomes)
            rejects.write(rejected)
            stats.add(batch.split, encoded, whole, rejected)
            sample.add(encoder, batch.new, encoded)
            done += batch.rows.num_rows
            b.report.progress("tokenizing", done, total, "rows")
    return stats


def _batches(parts: dict[str, list], cache: RowCache, total: int, every: int) -> Iterator[Batch]:
    """All rows in order. Of the new ones, one in `every` is compared."""
    done = seen = 0
    known = cache.found if len(cache.found) else np.full(total, -1)
    for split in SPLITS:
        for rows in read_batches(parts[split], _COLUMNS, batch_rows=BATCH):
            found = known[done : done + rows.num_rows]
            is_new = found < 0
            new = rows if is_new.all() else rows.filter(pa.array(is_new))
            yield Batch(split, rows, found, new, (seen + np.arange(new.num_rows)) % every == 0)
            done, seen = done + rows.num_rows, seen + new.num_rows


def _encode(
    encoder: BatchEncoder, batches: Iterator[Batch], new: int
) -> Generator[tuple[Batch, EncodedBatch], None, None]:
    """Every batch in order, with what became of its new rows.

    Whole columns leave the interpreter free, so threads encode them; rows one by one keep it busy, so where
    most rows go that way and there are many, worker processes do.
    """
    for batch in islice(batches, 1):
        first = encoder.encode(batch.new, batch.compared)
        yield batch, first
        if 4 * first.numbers["by_rows"] <= batch.new.num_rows:
            rest = threaded_map(_with(encoder), batches, worker_count())
        elif new < WORTH_PROCESSES:
            rest = threaded_map(_with(encoder), batches, 1)
        else:
            rest = ordered_map(_prepared, (encoder.config, encoder.fast), batches, here=_with(encoder))
        with closing(rest):
            yield from rest


def _with(encoder: BatchEncoder):
    return lambda batch: encoder.encode(batch.new, batch.compared)


def _prepared(config: TokenizedRowsConfig, fast: bool):
    return _with(BatchEncoder(config, fast))

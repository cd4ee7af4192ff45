"""Builds tokenized_rows from grouped_split: every row rendered, tokenized, masked, checked, and written."""

import shutil
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import chain
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tokenized_rows.batch_encoder import (
    Batch,
    BatchEncoder,
    EncodedBatch,
    FastPathDiffers,
    reject_rows,
)
from sft_pipeline.stages.tokenized_rows.checks import checks
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.outcomes import OUTCOMES, OUTCOMES_FILE
from sft_pipeline.stages.tokenized_rows.report import evidence
from sft_pipeline.stages.tokenized_rows.row_cache import RowCache
from sft_pipeline.stages.tokenized_rows.served_prompts import SHAPES_FILE, PromptSample
from sft_pipeline.stages.tokenized_rows.stats import StageStats
from sft_pipeline.stages.workers import ordered_map, threaded_map, worker_count
from sft_pipeline.store.files import sha256_json, write_json
from sft_pipeline.tables.parquet import (
    BackgroundWriter,
    FileWriter,
    PartWriter,
    count_rows,
    read_ahead,
    read_batches,
)
from sft_pipeline.tables.schemas import REJECTS, SPLITS, TOKENIZED
from sft_pipeline.text.conversation import unknown_tokens
from sft_pipeline.text.find_template import end_ids
from sft_pipeline.text.template import FROZEN_CLOCK, ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer

BATCH = 4_096
# Rows that go through both encoders, at least; where there are not twice as many, the reference does all.
COMPARED = 2_000
WORTH_PROCESSES = 8_000  # new rows; a worker process first needs a second to load the tokenizer
_COUNTED: tuple[str, ...] = ("tokens", "supervised_tokens", "weighted", "truncated", "split", "neutralised")
_COUNTED += ("turns_not_supervised", "by_columns", "by_rows", "compared")
_COLUMNS = ["row_id", "source", "file", "line", "group", "messages", "tools", "content_key"]


def build(b: Build) -> Built:
    """Renders, tokenizes and masks the rows of every split; those rejected are in rejects.parquet."""
    config: TokenizedRowsConfig = b.config
    try:
        encoder, sample, stats = _encode_all(b, fast=True)
    except FastPathDiffers as row:
        why = f"the fast encoder differs from the reference, for example on row {row}"
        b.report.log(f"tokenized_rows: {why}; all rows are encoded by the reference", "warning")
        encoder, sample, stats = _encode_all(b, fast=False)
        stats.why_not_fast = why
    served, skew = sample.compare(encoder)
    write_json(b.out / SHAPES_FILE, [f"{shape:016x}" for shape in sorted(served.shapes)])
    n = stats.numbers
    on_disk = {split: count_rows(sorted((b.out / split).glob("*.parquet"))) for split in SPLITS}
    rejected_on_disk = count_rows([b.out / "rejects.parquet"])
    formatting = _formatting(config, encoder.tokenizer, encoder.template) | {"counts": stats.summed_up()}
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
            **{name: n[name] for name in _COUNTED},
        },
        checks=checks(stats, served, skew, formatting, on_disk, rejected_on_disk),
        volatile=("plots/", SHAPES_FILE),
        reused_from=tuple(stats.reused_from),
        evidence=evidence(stats, formatting, config, encoder.tokenizer, b.out),
    )


def _formatting(config: TokenizedRowsConfig, tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    """What formatting.json records; everything that serves or evaluates the model must use the same."""
    stop_ids = tokenizer.ids(template.stop) if template.stop else []
    stop = stop_ids[0] if len(stop_ids) == 1 else None
    mask = {**config.tokens.model_dump(mode="json"), "system": config.template.system}
    return {
        "template_sha256": template.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "mask_sha256": sha256_json(mask),
        "template_name": "file" if "/" in template.name else template.name,
        "chat_template": template.text,
        "chat_template_with_tools": template.tool_text if template.tool_text != template.text else None,
        "clock": FROZEN_CLOCK.date().isoformat() if template.uses_clock else None,
        "special_tokens": dict(tokenizer.special),
        "tokens_as_text": unknown_tokens(template, tokenizer),
        "unopened_reply": _unopened_reply(template),
        "stop_text": template.stop,
        "stop_token_id": stop,
        "stop_token_ids": end_ids(tokenizer, template),
        "eos_token_id": tokenizer.id_of("eos_token"),
        "bos_token_id": tokenizer.id_of("bos_token"),
        "pad_token_id": tokenizer.id_of("pad_token"),
        "vocab_size": tokenizer.vocab_size,
        "control_tokens": dict(sorted(tokenizer.control.items(), key=lambda item: item[1])),
        "mask": mask,
    }


def _unopened_reply(template: ChatTemplate) -> str | None:
    """What stands before a reply and not in a server's prompt for it, such as "<|im_start|>assistant"."""
    asked = {"role": "user", "content": "What is asked"}
    answered = {"role": "assistant", "content": "What is answered"}
    try:
        prompt = template.render([asked], add_generation_prompt=True)
        whole = template.render([asked, answered])
    except jinja2.TemplateError:  # it refuses such a short conversation
        return None
    before, found, _ = whole.partition(answered["content"])
    header = before.removeprefix(prompt).strip()
    # Some templates put an empty thinking block here: that the model writes it is how it was trained.
    return header if found and before.startswith(prompt) and "assistant" in header.lower() else None


def _encode_all(b: Build, fast: bool) -> tuple[BatchEncoder, PromptSample, StageStats]:
    """Writes every split, the rejects and the outcomes.

    Args:
        fast: Whether the fast encoder may be used; few new rows go to the reference all the same.

    Raises:
        FastPathDiffers: A row came out of the two encoders differently.
    """
    parts = {split: b.inputs["grouped_split"].parts(split) for split in SPLITS}
    total, done = count_rows(chain(*parts.values())), 0
    sample, stats = PromptSample(b.inputs["grouped_split"], b.earlier), StageStats()
    for split in SPLITS:  # an attempt with the fast encoder may have written some
        shutil.rmtree(b.out / split, ignore_errors=True)
    scratch = b.work / "row_cache"
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        stack.callback(sample.close)
        with ThreadPoolExecutor(1) as thread:  # half a second for Qwen's vocabulary, without the interpreter
            loading = thread.submit(load_tokenizer, b.config.tokenizer, b.config.revision)
            keys = read_batches(chain(*parts.values()), ["content_key"]) if b.earlier else ()
            cache = RowCache(b.earlier, [batch.column(0) for batch in keys], scratch)
        stats.reused_from = cache.used
        new = total - int(np.count_nonzero(cache.found >= 0))
        encoder = BatchEncoder(b.config, loading.result(), fast and new >= 2 * COMPARED)
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
    return encoder, sample, stats


def _batches(parts: dict[str, list], cache: RowCache, total: int, every: int) -> Iterator[Batch]:
    """All rows in order. Of the new ones, one in `every` is compared."""
    done = seen = 0
    known = cache.found if len(cache.found) else np.full(total, -1)
    for split in SPLITS:
        for rows in read_ahead(read_batches(parts[split], _COLUMNS, batch_rows=BATCH)):
            found = known[done : done + rows.num_rows]
            is_new = found < 0
            new = rows if is_new.all() else rows.filter(pa.array(is_new))
            yield Batch(split, rows, found, new, (seen + np.arange(new.num_rows)) % every == 0)
            done, seen = done + rows.num_rows, seen + new.num_rows


def _encode(
    encoder: BatchEncoder, batches: Iterator[Batch], new: int
) -> Generator[tuple[Batch, EncodedBatch], None, None]:
    """Every batch in order, with the results of its new rows.

    The fast encoder leaves the interpreter free, so threads run it; the reference keeps it busy, so where
    most rows go there and there are many, worker processes do.
    """
    batch = next(batches, None)
    if batch is None:
        return
    first = encoder.encode(batch)
    yield batch, first
    if 4 * first.numbers["by_rows"] <= batch.new.num_rows:
        rest = threaded_map(encoder.encode, batches, worker_count())
    elif new < WORTH_PROCESSES:
        rest = threaded_map(encoder.encode, batches, min(worker_count(), 2))  # beside joining and writing
    else:
        arguments = (encoder.config, encoder.fast)
        rest = ordered_map(_worker_function, arguments, batches, function_here=encoder.encode)
    with closing(rest):
        yield from rest


def _worker_function(config: TokenizedRowsConfig, fast: bool) -> Callable[[Batch], EncodedBatch]:
    """What a worker process applies to batches, with an encoder of its own."""
    return BatchEncoder(config, load_tokenizer(config.tokenizer, config.revision), fast).encode

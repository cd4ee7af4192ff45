"""Builds `tokenized_rows` from `grouped_split`."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tables import REJECTS, FileWriter, PartWriter, count_rows, read_batches
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.conversation import Conversation, conversation
from sft_pipeline.stages.tokenized_rows.encode import IGNORE, Example, Refused, RowEncoder
from sft_pipeline.stages.tokenized_rows.pictures import Preview, plot_lengths, plot_masks
from sft_pipeline.stages.tokenized_rows.report import checks, evidence
from sft_pipeline.stages.tokenized_rows.rows import SIDES, TOKENIZED, to_batch
from sft_pipeline.stages.tokenized_rows.skew import find_skew
from sft_pipeline.stages.tokenized_rows.template import FROZEN_CLOCK, ChatTemplate, load_template
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer, load_tokenizer
from sft_pipeline.store.files import sha256_json, write_json

BATCH = 1024
SAMPLE = 1000
PREVIEWS = 3
EXAMPLES_OF_REJECTS = 10


@dataclass
class Seen:
    """What the checks and the report need to know, gathered while rows pass.

    Attributes:
        lengths: Tokens per example, one array per batch.
        supervised: Supervised tokens per example, one array per batch.
        read: Rows read per side.
        written: Examples written per side.
        rejects: Rejected rows per reason.
        refused: The first rejected rows, for people.
        broken: Written examples that break a promise, per promise. Stays empty.
        sample: Accepted conversations with their examples, for comparisons.
    """

    lengths: list[np.ndarray] = field(default_factory=list)
    supervised: list[np.ndarray] = field(default_factory=list)
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, Any]] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    sample: list[tuple[Conversation, Example]] = field(default_factory=list)


def build(b: Build) -> Built:
    """Renders, tokenizes and masks every row of every side; rejects go to rejects.parquet with their reason."""
    config: TokenizedRowsConfig = b.config
    tokenizer = load_tokenizer(config.tokenizer, config.revision)
    template = load_template(config.template.chat_template, tokenizer)
    encoder = RowEncoder(tokenizer, template, config.tokens, config.template.system)
    seen = Seen()
    split = b.inputs["grouped_split"]
    total = count_rows(p for side in SIDES for p in split.parts(side))
    with FileWriter(b.out / "rejects.parquet", REJECTS) as rejects:
        for side in SIDES:
            with PartWriter(b.out / side, TOKENIZED) as out:
                for batch in read_batches(split.parts(side), batch_rows=BATCH):
                    _encode_batch(encoder, batch.to_pylist(), side, seen, out, rejects)
                    b.report.progress("tokenizing", sum(seen.read.values()), total, "rows")
    recorded = _formatting(config, tokenizer, template, encoder)
    write_json(b.out / "formatting.json", recorded)
    skew = find_skew(tokenizer, template, [given for given, _ in seen.sample])
    on_disk = {side: count_rows(sorted((b.out / side).glob("*.parquet"))) for side in SIDES}
    _plot(b, tokenizer, seen, config)
    numbers = encoder.tally.numbers
    for reason, count in seen.rejects.most_common():
        b.report.log(f"tokenized_rows: {count} rows rejected: {reason}", "warning")
    return Built(
        counts={
            "rows_read": numbers["rows"],
            "rows_accepted": numbers["accepted"],
            "rows_rejected": numbers["rejected"],
            "rows_written": sum(on_disk.values()),
            **{side: on_disk[side] for side in SIDES},
            **{
                k: numbers[k]
                for k in (
                    "tokens",
                    "supervised_tokens",
                    "truncated",
                    "split",
                    "neutralised",
                    "turns_not_supervised",
                )
            },
        },
        checks=checks(seen, encoder, recorded, skew, on_disk, count_rows([b.out / "rejects.parquet"])),
        volatile=("plots/",),
        evidence=evidence(seen, encoder, config),
    )


def _encode_batch(
    encoder: RowEncoder,
    rows: list[dict[str, Any]],
    side: str,
    seen: Seen,
    out: PartWriter,
    rejects: FileWriter,
) -> None:
    examples: list[Example] = []
    refused: list[Refused] = []
    for row, outcome in zip(rows, encoder.encode(rows), strict=True):
        if isinstance(outcome, Refused):
            refused.append(outcome)
            continue
        examples += outcome
        if len(seen.sample) < SAMPLE and not outcome[0].truncated:
            seen.sample.append((encoder.guard.check(conversation(row, encoder.system)), outcome[0]))
    batch = to_batch(examples)
    _inspect(batch, seen)
    out.write(batch)
    rejects.append([_reject_row(r) for r in refused])
    seen.read[side] += len(rows)
    seen.written[side] += len(examples)
    for r in refused:
        seen.rejects[r.reason] += 1
        if sum(row["reason"] == r.reason for row in seen.refused) < EXAMPLES_OF_REJECTS // 3:
            seen.refused.append(
                {
                    "row_id": r.row["row_id"],
                    "file": r.row["file"],
                    "line": r.row["line"],
                    "reason": str(r.reason),
                    "detail": r.detail[:200],
                }
            )


def _reject_row(refused: Refused) -> dict[str, Any]:
    row = refused.row
    raw = json.dumps({"messages": row["messages"], "tools": row["tools"]}, ensure_ascii=False, sort_keys=True)
    return {
        "row_id": row["row_id"],
        "source": row["source"],
        "file": row["file"],
        "line": row["line"],
        "reasons": [str(refused.reason)],
        "raw": raw,
    }


def _inspect(batch: pa.RecordBatch, seen: Seen) -> None:
    """Looks at what is about to be written, as arrays: it must hold what the checks promise."""
    if not batch.num_rows:
        return
    ids, labels = (batch.column(name).flatten().to_numpy() for name in ("input_ids", "labels"))
    starts = batch.column("labels").offsets.to_numpy()[:-1]
    supervised = labels != IGNORE
    counted = batch.column("supervised").to_numpy()
    seen.broken["nothing supervised"] += int(np.count_nonzero(counted == 0))
    seen.broken["position 0 supervised"] += int(np.count_nonzero(supervised[starts]))
    seen.broken["label is not the input id"] += int(np.count_nonzero(supervised & (labels != ids)))
    seen.broken["supervised count is wrong"] += int(
        np.count_nonzero(np.add.reduceat(supervised, starts, dtype=np.int64) != counted)
    )
    seen.lengths.append(batch.column("length").to_numpy())
    seen.supervised.append(counted)


def _formatting(
    config: TokenizedRowsConfig, tokenizer: Tokenizer, template: ChatTemplate, encoder: RowEncoder
) -> dict[str, Any]:
    """What was used to format the rows; everything that serves or evaluates the model must use the same."""
    stop_ids = tokenizer.ids(template.stop) if template.stop else []
    stop = stop_ids[0] if len(stop_ids) == 1 else None
    ends = {i for i in (stop, tokenizer.id_of("eos_token"), *tokenizer.generation_eos) if i is not None}
    mask = {**config.tokens.model_dump(mode="json"), "system": config.template.system}
    return {
        "template_sha256": template.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "mask_sha256": sha256_json(mask),
        "template_name": template.name
        if template.name == "tokenizer" or "/" not in template.name
        else "file",
        "chat_template": template.text,
        "chat_template_with_tools": template.tool_text if template.tool_text != template.text else None,
        "clock": FROZEN_CLOCK.date().isoformat() if template.uses_clock else None,
        "special_tokens": dict(tokenizer.special),
        "stop_text": template.stop,
        "stop_token_id": stop,
        "stop_token_ids": sorted(ends),
        "eos_token_id": tokenizer.id_of("eos_token"),
        "bos_token_id": tokenizer.id_of("bos_token"),
        "pad_token_id": tokenizer.id_of("pad_token"),
        "vocab_size": tokenizer.vocab_size,
        "control_tokens": dict(sorted(tokenizer.control.items(), key=lambda item: item[1])),
        "mask": mask,
        "counts": {k: v for k, v in sorted(encoder.tally.numbers.items())},
    }


def _plot(b: Build, tokenizer: Tokenizer, seen: Seen, config: TokenizedRowsConfig) -> None:
    if seen.lengths:
        plot_lengths(
            b.out / "plots" / "lengths.png",
            np.concatenate(seen.lengths),
            np.concatenate(seen.supervised),
            config.tokens.max_length,
        )
    previews = [
        Preview(
            title=f"row {e.row_id[:12]}: {len(e.input_ids)} tokens, {int((e.labels != IGNORE).sum())} supervised (green)",
            tokens=[tokenizer.decode([i]) for i in e.input_ids.tolist()],
            supervised=(e.labels != IGNORE).tolist(),
            special=[i in tokenizer.control_ids for i in e.input_ids.tolist()],
        )
        for _, e in seen.sample[:PREVIEWS]
    ]
    if previews:
        plot_masks(b.out / "plots" / "mask_preview.png", previews)

"""Builds `tokenized_rows` from `grouped_split`."""

import shutil
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft_pipeline.stages.painter import Painter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tables import REJECTS, Behind, FileWriter, PartWriter, count_rows, read_batches
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.encode import IGNORE
from sft_pipeline.stages.tokenized_rows.encoding import Done, Encoders, Task, reject_rows
from sft_pipeline.stages.tokenized_rows.outcomes import OUTCOMES, Tally
from sft_pipeline.stages.tokenized_rows.pictures import Preview, plot_lengths, plot_masks
from sft_pipeline.stages.tokenized_rows.referee import SAMPLE, Comparison, Referee, Verdict
from sft_pipeline.stages.tokenized_rows.report import checks, evidence
from sft_pipeline.stages.tokenized_rows.reuse import OUTCOMES_FILE, Earlier, Given, content_keys
from sft_pipeline.stages.tokenized_rows.rows import SIDES, TOKENIZED
from sft_pipeline.stages.tokenized_rows.seen import PREVIEWS, Seen
from sft_pipeline.stages.tokenized_rows.skew import Skew
from sft_pipeline.stages.tokenized_rows.template import FROZEN_CLOCK, ChatTemplate
from sft_pipeline.stages.tokenized_rows.tokenizer import Tokenizer
from sft_pipeline.stages.workers import ordered_map, threaded_map, worker_count
from sft_pipeline.store.files import sha256_json, write_json

BATCH = 4_096
COMPARED = 2_000  # rows encoded both ways; where there are not twice as many, all rows go the slow way
WORTH_WORKERS = 8_000  # rows to encode the slow way; a worker first loads the tokenizer


class Differs(Exception):
    """The fast way gave another result than the slow one; a row is named."""


def build(b: Build) -> Built:
    """Renders, tokenizes and masks every row of every side; rejects go to rejects.parquet with their reason."""
    config: TokenizedRowsConfig = b.config
    known_skew = Skew.of_earlier(b.earlier)
    encoders = Encoders(config, columns=True)
    with Painter() as painter, Referee(config, encoders, skew=known_skew is None) as referee:
        try:
            seen, verdict = _encode_all(b, encoders, referee, painter)
        except Differs as row:
            why = f"the fast encoder differs from the reference, for example on row {row}"
            b.report.log(f"tokenized_rows: {why}; all rows are encoded by the reference", "warning")
            encoders = Encoders(config, columns=False)
            seen, verdict = _encode_all(b, encoders, referee, painter)
            seen.why_not = why
        recorded = _formatting(config, encoders.tokenizer, encoders.template, seen.tally)
        write_json(b.out / "formatting.json", recorded)
        on_disk = {side: count_rows(sorted((b.out / side).glob("*.parquet"))) for side in SIDES}
        if seen.lengths:
            painter.draw(plot_lengths, b.out / "plots" / "lengths.png", np.concatenate(seen.lengths), np.concatenate(seen.supervised), config.tokens.max_length)  # fmt: skip
    numbers = seen.tally.numbers
    for reason, count in seen.tally.reasons.most_common():
        b.report.log(f"tokenized_rows: {count} rows rejected: {reason}", "warning")
    return Built(
        counts={
            "rows_read": numbers["rows"],
            "rows_accepted": numbers["accepted"],
            "rows_rejected": numbers["rejected"],
            "rows_written": sum(on_disk.values()),
            "rows_tokenized": seen.numbers["tokenized"],
            "rows_reused": seen.numbers["reused"],
            **{side: on_disk[side] for side in SIDES},
            **{k: numbers[k] for k in ("tokens", "supervised_tokens", "truncated", "split", "neutralised", "turns_not_supervised")},
            **{k: seen.numbers[k] for k in ("by_columns", "by_rows", "by_reference", "compared")},
        },
        checks=checks(seen, verdict, known_skew or verdict.skew, recorded, on_disk, count_rows([b.out / "rejects.parquet"])),
        volatile=("plots/",),
        evidence=evidence(seen, encoders, config),
    )  # fmt: skip


# -- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """A batch of one side.

    Attributes:
        found: Which of its rows an earlier build has (-1: none).
        compare: Which of the others the referee looks at.
    """

    side: str
    rows: pa.RecordBatch
    keys: pa.Array
    found: np.ndarray
    compare: np.ndarray


def _encode_all(b: Build, encoders: Encoders, referee: Referee, painter: Painter) -> tuple[Seen, Verdict]:
    """Writes every side, rejects and outcomes.

    Raises:
        Differs: A compared row came out differently.
    """
    seen, comparison = Seen(), Comparison()
    for side in SIDES:
        shutil.rmtree(b.out / side, ignore_errors=True)
    total = count_rows(p for side in SIDES for p in b.inputs["grouped_split"].parts(side))
    scratch, drawn = b.work / "earlier", False
    try:
        known_keys = [content_keys(rows) for _, rows in _read(b, ["messages", "tools"])] if b.earlier else []
        earlier = Earlier(b.earlier, known_keys, scratch)
        new = (
            sum(int(np.count_nonzero(earlier.find(keys) < 0)) for keys in known_keys) if b.earlier else total
        )
        encoders.columns &= new > 2 * COMPARED
        writers = {side: PartWriter(b.out / side, TOKENIZED, dictionary=False) for side in SIDES}
        with (
            FileWriter(b.out / "rejects.parquet", REJECTS) as rejects,
            FileWriter(b.out / OUTCOMES_FILE, OUTCOMES) as outcomes,
            writers["train"], writers["validation"], writers["test"], Behind() as behind,
        ):  # fmt: skip
            sample = _Sample(_threshold(b), COMPARED if b.earlier else 0) if encoders.columns else _Sample("", SAMPLE)  # fmt: skip
            batches = _batches(b, earlier, known_keys, sample)
            with closing(_encoded(batches, encoders, referee, new)) as encoded:
                for batch, done in encoded:
                    comparison.add(batch.rows.filter(pa.array(batch.found < 0)), done, batch.compare)
                    whole = _joined(batch, done, earlier)
                    behind.submit(writers[batch.side].write, whole.examples)
                    outcomes.write(whole.outcomes)
                    refused = reject_rows(batch.rows, whole.outcomes)
                    rejects.write(refused)
                    seen.note(batch.side, batch.rows.num_rows, done, whole, refused)
                    if not drawn and len(seen.previews) == PREVIEWS:
                        drawn = _draw(b, encoders.tokenizer, seen, painter)
                    b.report.progress("tokenizing", sum(seen.read.values()), total, "rows")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not drawn and seen.previews:
        _draw(b, encoders.tokenizer, seen, painter)
    verdict = referee.verdict()
    seen.numbers["compared"] = comparison.by_columns
    if differing := comparison.first_difference(verdict):
        raise Differs(differing)
    return seen, verdict


def _threshold(b: Build) -> str:
    """The row ids up to this one are compared: they are hashes, so the smallest of them are a fair sample."""
    parts = [p for side in SIDES for p in b.inputs["grouped_split"].parts(side)]
    ids = pa.chunked_array([x.column(0) for x in read_batches(parts, ["row_id"])], pa.string())
    if len(ids) <= COMPARED:
        return "\U0010ffff"
    smallest = pc.select_k_unstable(pa.table({"row_id": ids}), COMPARED, [("row_id", "ascending")])
    return pc.max(ids.take(smallest)).as_py()


def _read(b: Build, columns: list[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """The rows of every side, a batch at a time."""
    for side in SIDES:
        for rows in read_batches(b.inputs["grouped_split"].parts(side), columns, batch_rows=BATCH):
            yield side, rows


def _batches(b: Build, earlier: Earlier, known_keys: list[pa.Array], sample: "_Sample") -> Iterator[_Batch]:
    columns = ["row_id", "source", "file", "line", "group", "messages", "tools"]
    for i, (side, rows) in enumerate(_read(b, columns)):
        keys = known_keys[i] if known_keys else content_keys(rows)
        found = earlier.find(keys)
        yield _Batch(side, rows, keys, found, sample.of(rows.column("row_id").filter(pa.array(found < 0))))


@dataclass
class _Sample:
    """Which of the rows to be encoded the referee looks at.

    Attributes:
        threshold: Those whose row id is up to this.
        first: And so many of the first: of few new rows a sample of all rows may hold none.
        seen: Rows to be encoded so far.
    """

    threshold: str
    first: int
    seen: int = 0

    def of(self, row_ids: pa.Array) -> np.ndarray:
        """A mask of rows to be encoded."""
        place = self.seen + np.arange(len(row_ids))
        self.seen += len(row_ids)
        return pc.less_equal(row_ids, self.threshold).to_numpy(zero_copy_only=False) | (place < self.first)


def _encoded(
    batches: Iterator[_Batch], encoders: Encoders, referee: Referee, new: int
) -> Generator[tuple[_Batch, Done], None, None]:
    """Every batch, with what became of those of its rows that no earlier build has.

    The fast way leaves the interpreter free, so it goes by threads. Where rows have to go the slow way, worker
    processes are worth their start if there are many.
    """
    waiting: deque[_Batch] = deque()

    def tasks() -> Iterator[Task]:
        for batch in batches:
            waiting.append(batch)
            is_new = pa.array(batch.found < 0)
            rows = batch.rows.filter(is_new)
            referee.look_at(rows.filter(pa.array(batch.compare)))
            yield Task(rows, batch.keys.filter(is_new))

    todo = tasks()
    for task in islice(todo, 1):
        first = encoders(task)
        yield waiting.popleft(), first
        slow = 4 * int(np.count_nonzero(~first.by_columns)) > len(first.by_columns)
        if slow and new > WORTH_WORKERS:
            results = (done for _, done in ordered_map(Encoders, encoders.arguments, todo, here=encoders, inline=lambda *_: False))  # fmt: skip
        else:
            results = threaded_map(encoders, todo, 1 if slow else worker_count())
        with closing(results):
            for done in results:
                yield waiting.popleft(), done


def _joined(batch: _Batch, done: Done, earlier: Earlier) -> Given:
    """Outcomes and examples of all rows of a batch, in order."""
    known = batch.found >= 0
    if not known.any():
        return Given(done.outcomes, done.examples)
    given = earlier.give(batch.found[known], batch.rows.filter(pa.array(known)))
    if known.all():
        return given
    position = np.concatenate([np.flatnonzero(known), np.flatnonzero(~known)])
    outcomes = pa.Table.from_batches([given.outcomes, done.outcomes], OUTCOMES)
    owner = np.repeat(position, outcomes["examples"].to_numpy())
    examples = pa.Table.from_batches([given.examples, done.examples], TOKENIZED)
    return Given(_in_order(outcomes, position), _in_order(examples, owner))


def _in_order(table: pa.Table, position: np.ndarray) -> pa.RecordBatch:
    """The rows by position, those of the same position as they are."""
    sorted_ = table.take(pa.array(np.argsort(position, kind="stable"))).combine_chunks().to_batches()
    return sorted_[0] if sorted_ else pa.RecordBatch.from_pylist([], schema=table.schema)


# -- what is recorded and shown -----------------------------------------------------------------------------------


def _formatting(
    config: TokenizedRowsConfig, tokenizer: Tokenizer, template: ChatTemplate, tally: Tally
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
        "counts": dict(sorted(tally.numbers.items())),
    }


def _draw(b: Build, tokenizer: Tokenizer, seen: Seen, painter: Painter) -> bool:
    """Draws the first examples, token by token."""
    previews = [
        Preview(
            title=f"row {e['row_id'][:12]}: {e['length']} tokens, {e['supervised']} supervised (green)",
            tokens=[tokenizer.decode([i]) for i in e["input_ids"]],
            supervised=[label != IGNORE for label in e["labels"]],
            special=[i in tokenizer.control_ids for i in e["input_ids"]],
        )
        for e in seen.previews
    ]
    painter.draw(plot_masks, b.out / "plots" / "mask_preview.png", previews)
    return True

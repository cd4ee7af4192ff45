"""Builds `tokenized_rows` from `grouped_split`."""

import shutil
from contextlib import closing

import numpy as np

from sft_pipeline.stages.painter import Painter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tokenized_rows.batches import BATCH, Batches, encoded
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.encoding import Encoders, reject_rows
from sft_pipeline.stages.tokenized_rows.outcomes import OUTCOMES
from sft_pipeline.stages.tokenized_rows.pictures import plot_lengths, plot_masks
from sft_pipeline.stages.tokenized_rows.referee import Comparison, Referee, Verdict
from sft_pipeline.stages.tokenized_rows.report import checks, evidence
from sft_pipeline.stages.tokenized_rows.reuse import OUTCOMES_FILE, Given
from sft_pipeline.stages.tokenized_rows.seen import Seen
from sft_pipeline.stages.tokenized_rows.skew import Skew
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.parquet import Behind, FileWriter, PartWriter, count_rows
from sft_pipeline.tables.schemas import REJECTS, SPLITS, TOKENIZED


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
            seen, verdict = _encode_all(b, Encoders(config, columns=False), referee, painter)
            seen.why_not = why
    formatting = {**verdict.formatting, "counts": dict(sorted(seen.tally.numbers.items()))}
    write_json(b.out / "formatting.json", formatting)
    on_disk = {side: count_rows(sorted((b.out / side).glob("*.parquet"))) for side in SPLITS}
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
            **{side: on_disk[side] for side in SPLITS},
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
            **{k: seen.numbers[k] for k in ("by_columns", "by_rows", "by_reference", "compared")},
        },
        checks=checks(
            seen,
            verdict,
            known_skew or verdict.skew,
            formatting,
            on_disk,
            count_rows([b.out / "rejects.parquet"]),
        ),
        volatile=("plots/",),
        evidence=evidence(seen, formatting, config),
    )


def _encode_all(b: Build, encoders: Encoders, referee: Referee, painter: Painter) -> tuple[Seen, Verdict]:
    """Writes every side, rejects and outcomes, and draws.

    Raises:
        Differs: A compared row came out differently.
    """
    seen, comparison, pictures = Seen(), Comparison(), b.out / "plots"
    for side in SPLITS:
        shutil.rmtree(b.out / side, ignore_errors=True)
    scratch = b.work / "earlier"
    try:
        batches = Batches(
            {s: b.inputs["grouped_split"].parts(s) for s in SPLITS}, b.earlier, scratch, fast=encoders.columns
        )
        writers = {
            side: PartWriter(b.out / side, TOKENIZED, row_group=BATCH, of_tokens=True) for side in SPLITS
        }
        with (
            FileWriter(b.out / "rejects.parquet", REJECTS) as rejects,
            FileWriter(b.out / OUTCOMES_FILE, OUTCOMES) as outcomes,
            writers["train"],
            writers["validation"],
            writers["test"],
            Behind() as behind,
            closing(encoded(batches, encoders, referee)) as results,
        ):
            preview, drawn = None, False
            for batch, done in results:
                if batches.compares:
                    comparison.add(batch, done)
                whole = batches.earlier.joined(batch.found, batch.rows, Given(done.outcomes, done.examples))
                behind.submit(writers[batch.side].write, whole.examples)
                behind.submit(outcomes.write, whole.outcomes)
                refused = reject_rows(batch.rows, whole.outcomes)
                rejects.write(refused)
                seen.note(batch.side, batch.rows.num_rows, done, whole, refused)
                preview = preview or (referee.preview(seen.previews) if seen.previews else None)
                if preview and preview.is_here and not drawn:
                    painter.draw(plot_masks, pictures / "mask_preview.png", preview.get())
                    drawn = True
                b.report.progress("tokenizing", sum(seen.read.values()), batches.total, "rows")
            if preview:
                if not drawn:
                    painter.draw(plot_masks, pictures / "mask_preview.png", preview.get())
                painter.draw(
                    plot_lengths,
                    pictures / "lengths.png",
                    np.concatenate(seen.lengths),
                    np.concatenate(seen.supervised),
                    b.config.tokens.max_length,
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    verdict = referee.verdict()
    seen.numbers["compared"] = comparison.by_columns
    if differing := comparison.first_difference(verdict):
        raise Differs(differing)
    return seen, verdict

"""What came of a stage, in a line or two for whoever watches it: counts, what was left out and why."""

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import count_details, count_reasons
from sft_pipeline.tables.reasons import RejectReason

MOST_REASONS = 4
FEW_UPDATES = 50
LONGEST_DETAIL = 120  # characters


class Line(NamedTuple):
    """One line, and its level as `Reporter.log` has it."""

    text: str
    level: str = "info"


def summarize(artifact: Artifact) -> Iterator[Line]:
    """The lines about an artifact; none for stages that speak for themselves."""
    stage = artifact.manifest.asset.rpartition("/")[2]
    if say := _STAGES.get(stage):
        yield from say(artifact, artifact.manifest.counts)
    for check in artifact.manifest.checks:
        if not check["passed"] and not check["blocking"]:
            yield Line(f"{stage}: {check['name']}: {check['description']}", "warning")


def _raw_rows(artifact: Artifact, counts: Mapping[str, int]) -> Iterator[Line]:
    text = f"raw_rows: {counts['rows']:,} rows from {_many(counts['files'], 'file')}"
    if counts["sampled_out"]:
        text += f", {counts['sampled_out']:,} left out by limit or weight"
    yield Line(text)


def _validated_rows(artifact: Artifact, counts: Mapping[str, int]) -> Iterator[Line]:
    left_out = counts.get("not_selected", 0)
    rejected = counts["quarantined"] - left_out
    text = f"validated_rows: {counts['accepted']:,} of {counts['accepted'] + rejected:,} rows"
    if counts.get("merged"):
        text += f" (dialogues, of {counts['read']:,} turns)"
    if left_out:
        text += f", {left_out:,} more not selected"
    if rejected:
        text += f"; {rejected:,} rejected: {_reasons(artifact, 'quarantine.parquet')}"
        yield Line(f"{text}. See {artifact.file('quarantine.md')}", "warning")
    else:
        yield Line(text)


def _grouped_split(artifact: Artifact, counts: Mapping[str, int]) -> Iterator[Line]:
    splits = ", ".join(f"{counts[name]:,} {name}" for name in ("train", "validation", "test"))
    text = f"grouped_split: {splits} rows"
    dropped = counts["rejects"]
    if not dropped:
        yield Line(text)
        return
    share = dropped / max(1, counts["read"])
    where = artifact.file("rejects.parquet")
    yield Line(f"{text}; {dropped:,} ({share:.0%}) dropped as near-duplicates of held-out rows: {where}")


def _tokenized_rows(artifact: Artifact, counts: Mapping[str, int]) -> Iterator[Line]:
    text = (
        f"tokenized_rows: {counts['tokens']:,} tokens in {counts['rows_written']:,} rows, "
        f"{counts['supervised_tokens']:,} of them with loss"
    )
    for name, words in (("truncated", "truncated"), ("neutralised", "with neutralised control tokens")):
        if counts[name]:
            text += f"; {counts[name]:,} rows {words}"
    if counts["rows_rejected"]:
        text += f"; {counts['rows_rejected']:,} rejected: {_reasons(artifact, 'rejects.parquet')}"
        yield Line(f"{text}. See {artifact.file('rejects.parquet')}", "warning")
    else:
        yield Line(text)
    silent, heard = counts["turns_not_supervised"], counts["rows_accepted"]
    if silent > heard:
        yield Line(
            f"tokenized_rows: {silent:,} of {silent + heard:,} assistant turns carry no loss, since only the "
            "final one of a row does; tokens.supervise: assistant trains on all of them",
            "warning",
        )


def _packed_shards(artifact: Artifact, counts: Mapping[str, int]) -> Iterator[Line]:
    updates = counts["updates"]
    if updates:
        budget = json.loads(artifact.file("budget.json").read_bytes())
        examples, tokens = (
            budget[f"{name}_per_update"]["mean"] for name in ("examples", "supervised_tokens")
        )
        yield Line(
            f"packed_shards: {_many(updates, 'update')} of about {examples:,.1f} examples and {tokens:,.0f} "
            "tokens with loss"
        )
    if updates < FEW_UPDATES:
        yield Line(
            f"packed_shards: {_many(updates, 'update')} may teach little: more epochs, or a smaller "
            "training.blocks_per_update, makes more of them",
            "warning",
        )


_STAGES = {
    "raw_rows": _raw_rows,
    "validated_rows": _validated_rows,
    "grouped_split": _grouped_split,
    "tokenized_rows": _tokenized_rows,
    "packed_shards": _packed_shards,
}


def _reasons(artifact: Artifact, name: str) -> str:
    """ "empty_completion 50, missing_field 3 (prompt) and 2 more reasons" """
    found = count_reasons([artifact.file(name)])
    found.pop(str(RejectReason.NOT_SELECTED), None)
    details = count_details([artifact.file(name)])

    def what(reason: str) -> str:
        most = (
            [text[:LONGEST_DETAIL] for text, _ in details[reason].most_common(2)] if reason in details else []
        )
        return f" ({'; '.join(most)}{'; …' if len(details[reason]) > 2 else ''})" if most else ""

    first = list(found.items())[:MOST_REASONS]
    named = ", ".join(f"{reason} {rows:,}{what(reason)}" for reason, rows in first)
    more = len(found) - MOST_REASONS
    return f"{named} and {_many(more, 'more reason')}" if more > 0 else named


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

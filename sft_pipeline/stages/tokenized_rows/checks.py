"""The checks of tokenized_rows: what must hold of every row, and what to know before training."""

from collections.abc import Mapping
from typing import Any

from sft_pipeline.stages.stage import Check, number, table
from sft_pipeline.stages.tokenized_rows.served_prompts import SERVED_CHECK, ServedPrompts
from sft_pipeline.stages.tokenized_rows.stats import StageStats
from sft_pipeline.stages.tokenized_rows.tokenizer_skew import SKEW_CHECK, TokenizerSkew
from sft_pipeline.text.exported_tokenizer import remedy
from sft_pipeline.text.reasons import MEANING, Reason

MAX_REJECT_RATE = 0.05

MAX_BROKEN_RATE = 0.01
"""Rows that fail a proof are rejected one by one; beyond this share, tokenizer and template do not fit."""


def checks(
    stats: StageStats,
    served: ServedPrompts,
    skew: TokenizerSkew,
    formatting: Mapping[str, Any],
    on_disk: Mapping[str, int],
    rejected_on_disk: int,
) -> tuple[Check, ...]:
    """One result per declared check.

    Args:
        formatting: What formatting.json holds.
        on_disk: Examples in the files of each split.
        rejected_on_disk: Rows in rejects.parquet.
    """
    n, rejected = stats.numbers, stats.reasons
    read = sum(stats.read.values())

    def few(reason: Reason) -> bool:
        return rejected[reason] <= MAX_BROKEN_RATE * read

    broken = {invariant: count for invariant, count in stats.broken.items() if count}
    marks = n["marks_agree"] + n["marks_disagree"]
    disagreed = rejected[Reason.MASK_DISAGREEMENT]
    written: list[dict[str, Any]] = [
        {"before the completion": before, "after it": after, "rows": rows}
        for (before, after), rows in stats.inserted.most_common(10)
        if before or after
    ]
    agreement = f"; the template's generation marks name the same turns in {n['marks_agree']} of {marks} rows"
    insertion = f"; the template writes text of its own into {sum(w['rows'] for w in written)} answers"
    return (
        Check(
            "supervised_everywhere",
            not broken,
            f"broken: {broken}"
            if broken
            else f"all {n['examples']} examples have a supervised token, none at position 0",
        ),
        Check(
            "mask_certificate",
            stats.broken["supervised count is wrong"] == 0 and few(Reason.MASK_DISAGREEMENT),
            f"both derivations agree on all {n['accepted']} rows kept; {disagreed} rows were rejected "
            "because they do not" + (agreement if marks else ""),
            {"agreed": number(n["accepted"]), "disagreed": number(disagreed)},
        ),
        Check(
            "decode_round_trip",
            few(Reason.DECODE_MISMATCH),
            f"decoding gives back the text of all {n['accepted']} rows kept, the completion in it once; "
            f"{rejected[Reason.DECODE_MISMATCH]} rows were rejected because it does not, "
            f"{rejected[Reason.COMPLETION_NOT_RENDERED]} because the template alters the completion"
            + (insertion if written else ""),
            {"inserted_by_the_template": table(written)} if written else {},
        ),
        Check(
            "prompt_prefix_exact",
            not served.not_prefix,
            "every row kept begins with the ids of the prompt that a server sends "
            f"({served.sampled} rendered and encoded again: {len(served.not_prefix)} differ); "
            f"{rejected[Reason.PROMPT_NOT_PREFIX]} rows were rejected because the template renders their "
            "earlier turns differently",
            {"wrong": table(served.not_prefix[:10])} if served.not_prefix else {},
        ),
        _served(served),
        _fields(stats, served),
        Check(
            "no_forged_control_tokens",
            few(Reason.CONTROL_TOKEN_MISMATCH),
            f"the control tokens of all {n['accepted']} rows kept are those of the template, in order; "
            f"{rejected[Reason.CONTROL_TOKEN_IN_TEXT]} rows were rejected for literal ones, "
            f"{n['neutralised']} neutralised, {rejected[Reason.CONTROL_TOKEN_MISMATCH]} rejected for a "
            "mismatch",
            {
                "rejected": number(rejected[Reason.CONTROL_TOKEN_IN_TEXT]),
                "neutralised": number(n["neutralised"]),
            },
        ),
        Check(
            "fingerprints_recorded",
            all(formatting[f"{what}_sha256"] for what in ("template", "tokenizer", "mask")),
            ", ".join(f"{w} {formatting[f'{w}_sha256'][:12]}" for w in ("template", "tokenizer", "mask")),
        ),
        _counts(stats, on_disk, rejected_on_disk),
        _splits(stats),
        _rate(stats),
        Check(
            SKEW_CHECK,
            not skew.found,
            skew.description,
            {"first_difference": table([skew.example])} if skew.example else {},
        ),
        _turns_end(formatting),
        _reply_opened(formatting),
        _stop(formatting),
    )


def _served(served: ServedPrompts) -> Check:
    count = len(served.wrong)
    if served.wrong:
        first = served.wrong[0]
        description = (
            f"{count} of {served.sampled} sampled rows differ from their source or from what a server sends; "
            f"the first, {first['row']}: {first['why']}. Where only the tokenizer's class is "
            "to blame (an architecture for which AutoTokenizer takes a class of its own, whatever "
            f"tokenizer_config.json says): {remedy(served.tokenizer)}"
        )
    else:
        description = (
            f"{served.compared} rows rendered again from their source files begin with the same ids, and "
            f"{served.served} of them by transformers with the tokenizer that would be exported"
        )
        if served.compared > served.served:
            description += "; the others have shapes that an earlier build has compared"
        if served.neutralised:
            description += f"; {served.neutralised} rows with neutralised control tokens were left out"
        if served.unavailable:
            description = f"{served.served} rows compared with transformers; {served.unavailable}"
    return Check(
        SERVED_CHECK,
        not served.wrong,
        description,
        {"different": table(served.wrong[:10])} if served.wrong else {},
    )


def _fields(stats: StageStats, served: ServedPrompts) -> Check:
    rejected = stats.reasons[Reason.FIELD_NOT_RENDERED]
    if served.lost:
        first = served.lost[0]
        description = (
            f"{len(served.lost)} texts of source rows are not in their training rows; the first is in "
        )
        description += f"{first['field']} of {first['row']}"
        return Check("fields_rendered", False, description, {"lost": table(served.lost[:10])})
    fields = [{"field": name, "rows": count} for name, count in stats.not_rendered.most_common()]
    return Check(
        "fields_rendered",
        not served.lost,
        "every content, call and tool of all rows kept moves the text, and so does the reasoning of their "
        f"final turns; {rejected} rows were rejected because the template leaves some of it out"
        + (f" ({', '.join(str(f['field']) for f in fields)})" if fields else ""),
        {"not_rendered": table(fields)} if fields else {},
    )


def _counts(stats: StageStats, on_disk: Mapping[str, int], rejected_on_disk: int) -> Check:
    n, read = stats.numbers, sum(stats.read.values())
    good = (
        read == n["rows"] == n["accepted"] + n["rejected"]
        and n["rejected"] == rejected_on_disk == sum(stats.reasons.values())
        and n["examples"] == sum(on_disk.values())
        and all(on_disk[split] == stats.written[split] for split in on_disk)
    )
    description = f"{read} read = {n['accepted']} accepted + {n['rejected']} rejected"
    if further := n["examples"] - n["accepted"]:
        description += f"; {further} further parts of split rows"
    splits = [{"split": s, "rows_read": stats.read[s], "examples": count} for s, count in on_disk.items()]
    return Check("counts_add_up", good, description, {"splits": table(splits)})


def _splits(stats: StageStats) -> Check:
    lost = [split for split, read in stats.read.items() if read and not stats.written[split]]
    good = bool(stats.written["train"]) and not lost
    description = "examples: " + ", ".join(f"{s} {stats.written[s]}" for s in ("train", "validation", "test"))
    if not good:
        description += f". Empty: {', '.join(lost) or 'train'}"
        if stats.reasons:
            description += f"; most frequent reason: {stats.reasons.most_common(1)[0][0]}"
    return Check("splits_not_empty", good, description)


def _rate(stats: StageStats) -> Check:
    n, context_only = stats.numbers, stats.numbers["turns_not_supervised"]
    share = (n["rejected"] + n["truncated"]) / max(n["rows"], 1)
    description = f"{n['rejected']} rows rejected and {n['truncated']} truncated of {n['rows']} ({share:.1%})"
    if context_only:
        description += (
            f"; {context_only} assistant turns are context only, because the template or a token boundary "
            "changes them in later prompts"
        )
    reasons = [
        {"reason": str(reason), "rows": count, "meaning": MEANING[Reason(reason)]}
        for reason, count in stats.reasons.most_common()
    ]
    return Check(
        "reject_rate",
        share <= MAX_REJECT_RATE and context_only <= MAX_REJECT_RATE * n["rows"],
        description,
        {"reasons": table(reasons)} if reasons else {},
    )


def _turns_end(formatting: Mapping[str, Any]) -> Check:
    ends = formatting["stop_text"] is not None
    return Check(
        "turns_end",
        ends,
        f"turns end with {formatting['stop_text']!r}"
        if ends
        else "the template writes nothing behind an assistant's turn, so the model never learns to stop: let "
        "it end each turn with the tokenizer's eos, or take a named template",
    )


def _reply_opened(formatting: Mapping[str, Any]) -> Check:
    """Whether the model has to write the beginning of its turn itself, since no prompt has it."""
    header = formatting["unopened_reply"]
    return Check(
        "reply_opened",
        header is None,
        "a server's prompt ends where the reply begins"
        if header is None
        else f"a server's prompt ends before {header!r}, which the model must learn to write, and which will "
        "stand in its replies: let the template write it where add_generation_prompt is set",
    )


def _stop(formatting: Mapping[str, Any]) -> Check:
    problems = []
    if formatting["stop_text"] is not None and formatting["stop_token_id"] is None:
        problems.append(
            f"turns end with the text {formatting['stop_text']!r}, which is several tokens: servers need it "
            "as a stop string"
        )
    if unknown := formatting["tokens_as_text"]:
        problems.append(
            f"the template writes {', '.join(unknown)}, which are no tokens of this tokenizer but ordinary "
            "text: turns are told apart less surely, and some earlier ones may not be supervised. "
            "Choose the tokenizer's own template, or alpaca or plain"
        )
    if formatting["clock"]:
        problems.append(
            f"the template reads the clock: rows are rendered as of {formatting['clock']}, a server renders "
            "today's date"
        )
    good = f"turns end with {formatting['stop_text']!r} (id {formatting['stop_token_id']})"
    return Check("stop_token", not problems, "; ".join(problems) or good)

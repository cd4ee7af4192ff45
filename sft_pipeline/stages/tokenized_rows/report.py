"""The checks of `tokenized_rows` and what people see of it."""

from typing import Any

import numpy as np

from sft_pipeline.stages.stage import Check, Evidence, markdown, number, plot, table
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.stages.tokenized_rows.referee import Verdict
from sft_pipeline.stages.tokenized_rows.seen import Seen
from sft_pipeline.stages.tokenized_rows.skew import CHECK as SKEW_CHECK
from sft_pipeline.stages.tokenized_rows.skew import Skew
from sft_pipeline.text.reasons import MEANING, Reason

MAX_REJECT_RATE = 0.05

MAX_BROKEN_RATE = 0.01
"""Rows that fail a proof are rejected one by one; more than this share means that tokenizer and template do not fit."""


def checks(
    seen: Seen,
    verdict: Verdict,
    skew: Skew,
    recorded: dict[str, Any],
    on_disk: dict[str, int],
    rejected_on_disk: int,
) -> tuple[Check, ...]:
    """One outcome per declared check."""
    n = seen.tally.numbers
    rejected = seen.tally.reasons
    return (
        _supervised(seen, n["examples"]),
        Check(
            "mask_certificate",
            seen.broken["supervised count is wrong"] == 0 and _few(seen, Reason.MASK_DISAGREEMENT),
            f"both derivations agree on all {n['accepted']} rows kept; {rejected[Reason.MASK_DISAGREEMENT]} rows were rejected because they do not"
            + _marks(n["marks_agree"], n["marks_disagree"]),
            {"agreed": number(n["accepted"]), "disagreed": number(rejected[Reason.MASK_DISAGREEMENT])},
        ),
        _round_trip(seen),
        _prefix(seen, verdict),
        Check(
            "no_forged_control_tokens",
            _few(seen, Reason.CONTROL_TOKEN_MISMATCH),
            f"the control tokens of all {n['accepted']} rows kept are those of the template, in order; "
            f"{rejected[Reason.CONTROL_TOKEN_IN_TEXT]} rows were rejected for literal ones, {n['neutralised']} neutralised, "
            f"{rejected[Reason.CONTROL_TOKEN_MISMATCH]} rejected for a mismatch",
            {
                "rejected": number(rejected[Reason.CONTROL_TOKEN_IN_TEXT]),
                "neutralised": number(n["neutralised"]),
            },
        ),
        Check(
            "fingerprints_recorded",
            all(recorded[k] for k in ("template_sha256", "tokenizer_sha256", "mask_sha256")),
            f"template {recorded['template_sha256'][:12]}, tokenizer {recorded['tokenizer_sha256'][:12]}, mask {recorded['mask_sha256'][:12]}",
        ),
        _counts(seen, n, on_disk, rejected_on_disk),
        _sides(seen),
        _rate(seen),
        Check(
            SKEW_CHECK,
            not skew.found,
            skew.describe(),
            {"first_difference": table([skew.example])} if skew.example else {},
        ),
        _stop(recorded),
    )


def _few(seen: Seen, reason: Reason) -> bool:
    return seen.tally.reasons[reason] <= MAX_BROKEN_RATE * sum(seen.read.values())


def _marks(agree: int, disagree: int) -> str:
    if not agree + disagree:
        return ""
    return f"; the template's own generation marks name the same turns in {agree} of {agree + disagree} rows"


def _supervised(seen: Seen, examples: int) -> Check:
    broken = {k: v for k, v in seen.broken.items() if v}
    description = (
        f"all {examples} examples have a supervised token, none at position 0"
        if not broken
        else f"broken: {broken}"
    )
    return Check("supervised_everywhere", not broken, description)


def _round_trip(seen: Seen) -> Check:
    n, rejected = seen.tally.numbers, seen.tally.reasons
    written: list[dict[str, Any]] = [
        {"before the completion": before, "after it": after, "rows": rows}
        for (before, after), rows in seen.tally.inserted.most_common(10)
        if before or after
    ]
    return Check(
        "decode_round_trip",
        _few(seen, Reason.DECODE_MISMATCH),
        f"decoding gives back the text of all {n['accepted']} rows kept, the completion in it once; {rejected[Reason.DECODE_MISMATCH]} rows rejected because "
        f"it does not, {rejected[Reason.COMPLETION_NOT_RENDERED]} because the template alters the completion"
        + (
            f"; the template writes text of its own into {sum(w['rows'] for w in written)} answers"
            if written
            else ""
        ),
        {"inserted_by_the_template": table(written)} if written else {},
    )


def _prefix(seen: Seen, verdict: Verdict) -> Check:
    """Every row was encoded as prompt + rest; a sample is rendered and encoded again from its messages."""
    wrong, rejected = verdict.wrong_prompts, seen.tally.reasons[Reason.PROMPT_NOT_PREFIX]
    return Check(
        "prompt_prefix_exact",
        not wrong,
        f"every row kept begins with the ids of the prompt a server sends ({verdict.prompts} rendered and encoded again: {len(wrong)} differ); "
        f"{rejected} rows were rejected because the template renders their history differently",
        {"wrong": table(wrong[:10])} if wrong else {},
    )


def _counts(seen: Seen, n: Any, on_disk: dict[str, int], rejected_on_disk: int) -> Check:
    read = sum(seen.read.values())
    rows_add_up = read == n["rows"] == n["accepted"] + n["rejected"] and n[
        "rejected"
    ] == rejected_on_disk == sum(seen.tally.reasons.values())
    good = (
        rows_add_up
        and n["examples"] == sum(on_disk.values())
        and all(on_disk[s] == seen.written[s] for s in on_disk)
    )
    extra = n["examples"] - n["accepted"]
    return Check(
        "counts_add_up",
        good,
        f"{read} read = {n['accepted']} accepted + {n['rejected']} rejected"
        + (f"; {extra} further parts of split rows" if extra else ""),
        {"sides": table([{"side": s, "rows_read": seen.read[s], "examples": on_disk[s]} for s in on_disk])},
    )


def _sides(seen: Seen) -> Check:
    lost = [s for s, read in seen.read.items() if read and not seen.written[s]]
    good = bool(seen.written["train"]) and not lost
    why = (
        f"; most frequent reason: {seen.tally.reasons.most_common(1)[0][0]}"
        if seen.tally.reasons and not good
        else ""
    )
    description = ", ".join(f"{s} {seen.written[s]}" for s in ("train", "validation", "test"))
    return Check(
        "sides_not_empty",
        good,
        f"examples: {description}" + (f". Empty: {', '.join(lost) or 'train'}{why}" if not good else ""),
    )


def _rate(seen: Seen) -> Check:
    n = seen.tally.numbers
    touched = n["rejected"] + n["truncated"]
    share = touched / max(n["rows"], 1)
    left_out = n["turns_not_supervised"]
    parts = [f"{n['rejected']} rows rejected and {n['truncated']} truncated of {n['rows']} ({share:.1%})"]
    if left_out:
        parts.append(
            f"{left_out} assistant turns are context only, because the template or a token boundary changes them once they are history"
        )
    evidence = (
        {
            "reasons": table(
                [
                    {"reason": str(r), "rows": c, "meaning": MEANING[Reason(r)]}
                    for r, c in seen.tally.reasons.most_common()
                ]
            )
        }
        if seen.tally.reasons
        else {}
    )
    return Check(
        "reject_rate",
        share <= MAX_REJECT_RATE and left_out <= MAX_REJECT_RATE * n["rows"],
        "; ".join(parts),
        evidence,
    )


def _stop(recorded: dict[str, Any]) -> Check:
    problems = []
    if recorded["stop_text"] is None:
        problems.append("nothing ends an assistant's turn, so the model never learns to stop")
    elif recorded["stop_token_id"] is None:
        problems.append(
            f"turns end with the text {recorded['stop_text']!r}, which is several tokens: servers need it as a stop string"
        )
    if recorded["clock"]:
        problems.append(
            f"the template reads the clock: rows are rendered as of {recorded['clock']}, a server will say today"
        )
    stop = f"turns end with {recorded['stop_text']!r} (id {recorded['stop_token_id']})"
    return Check("stop_token", not problems, "; ".join(problems) or stop)


def evidence(seen: Seen, formatting: dict[str, Any], config: TokenizedRowsConfig) -> dict[str, Evidence]:
    """Numbers, tables and plots for people."""
    n = seen.tally.numbers
    found: dict[str, Evidence] = {
        "row_count": number(n["examples"]),
        "tokens": number(n["tokens"]),
        "supervised_tokens": number(n["supervised_tokens"]),
        "supervised_share": number(round(n["supervised_tokens"] / max(n["tokens"], 1), 4)),
        "rows_rejected": number(n["rejected"]),
    }
    if seen.lengths:
        lengths, supervised = np.concatenate(seen.lengths), np.concatenate(seen.supervised)
        quantiles = (0, 0.5, 0.9, 0.99, 1)
        found["length_quantiles"] = table(
            [
                {
                    "quantile": f"{q:.0%}",
                    "tokens": int(np.quantile(lengths, q)),
                    "supervised": int(np.quantile(supervised, q)),
                }
                for q in quantiles
            ]
        )
        found["lengths_plot"] = plot("plots/lengths.png")
        found["mask_preview"] = plot("plots/mask_preview.png")
    found["encoding"] = markdown(_encoding(seen))
    if seen.refused:
        found["first_rejected_rows"] = table(seen.refused)
    found["chat_template"] = markdown(
        f"`{config.template.chat_template}`\n\n```jinja\n{formatting['chat_template']}\n```"
    )
    return found


def _encoding(seen: Seen) -> str:
    """How the rows were encoded, and what the fast way was compared with."""
    n = seen.numbers
    lines = [
        f"{n['tokenized']:,} rows tokenized, {n['reused']:,} reused from earlier builds by their content."
    ]
    if n["by_columns"]:
        lines.append(
            f"{n['by_columns']:,} rows by the fast encoder ({n['by_reference']:,} of their texts, which are not plain ASCII, by the reference tokenizer), "
            f"{n['by_rows']:,} row by row. {n['compared']:,} rows were encoded both ways: no difference."
        )
    else:
        why = f" ({seen.why_not})" if seen.why_not else ""
        lines.append(f"All of them row by row by the reference tokenizer{why}.")
    return "\n\n".join(lines)

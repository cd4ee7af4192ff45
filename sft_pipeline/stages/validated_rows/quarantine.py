"""Why a row is rejected: the one list of reasons, and the report that people read."""

from pathlib import Path

from sft_pipeline.stages.raw_rows.decode import ExplainedEnum, Undecodable
from sft_pipeline.tables import parquet

EXAMPLES = 3


class Reason(ExplainedEnum):
    """Every reason that can stand in quarantine.parquet, with its explanation."""

    # What raw_rows could not decode.
    INVALID_UTF8 = Undecodable.INVALID_UTF8.value, Undecodable.INVALID_UTF8.explanation
    INVALID_UNICODE = Undecodable.INVALID_UNICODE.value, Undecodable.INVALID_UNICODE.explanation
    INVALID_JSON = Undecodable.INVALID_JSON.value, Undecodable.INVALID_JSON.explanation
    NOT_AN_OBJECT = Undecodable.NOT_AN_OBJECT.value, Undecodable.NOT_AN_OBJECT.explanation
    NOT_FINITE = Undecodable.NOT_FINITE.value, Undecodable.NOT_FINITE.explanation
    DUPLICATE_KEY = Undecodable.DUPLICATE_KEY.value, Undecodable.DUPLICATE_KEY.explanation
    TOO_DEEP = Undecodable.TOO_DEEP.value, Undecodable.TOO_DEEP.explanation
    LINE_TOO_LONG = Undecodable.LINE_TOO_LONG.value, Undecodable.LINE_TOO_LONG.explanation
    INVALID_CSV = Undecodable.INVALID_CSV.value, Undecodable.INVALID_CSV.explanation
    RAGGED_ROW = Undecodable.RAGGED_ROW.value, Undecodable.RAGGED_ROW.explanation
    UNSUPPORTED_VALUE = Undecodable.UNSUPPORTED_VALUE.value, Undecodable.UNSUPPORTED_VALUE.explanation
    # The shape of the row.
    MISSING_FIELD = (
        "missing_field",
        "a field that the format needs is absent: map it with `columns`, or choose another format",
    )
    WRONG_TYPE = (
        "wrong_type",
        "a field holds another type than the format says, for example a number where text belongs",
    )
    UNSUPPORTED_CONTENT = "unsupported_content", "a message has a part that is not text, for example an image"
    INVALID_TOOLS = "invalid_tools", "`tools` is not a JSON list of objects"
    INVALID_TOOL_CALL = "invalid_tool_call", "a function call is not JSON with a name and arguments"
    # The contract.
    MISSING_GROUP = "missing_group", "no group key: the row could leak from one side of the split to another"
    INVALID_TIME = "invalid_time", "no ISO date or time in the time column"
    ILLEGAL_ROLE = "illegal_role", "a role other than system, user, assistant, tool and their known aliases"
    ROLES_DO_NOT_ALTERNATE = (
        "roles_do_not_alternate",
        "the turns do not alternate: an optional system message, then user and assistant in turn, tool results after calls",
    )
    NO_FINAL_COMPLETION = (
        "no_final_completion",
        "the conversation does not end with the assistant: there is nothing to learn",
    )
    EMPTY_PROMPT = "empty_prompt", "the prompt is empty or white space"
    EMPTY_MESSAGE = "empty_message", "a turn before the last is empty or white space"
    EMPTY_COMPLETION = "empty_completion", "the completion is empty, null or white space"
    PROMPT_TOO_SHORT = "prompt_too_short", "the prompt has fewer characters than contract.min_prompt_chars"
    PROMPT_TOO_LONG = "prompt_too_long", "the prompt has more characters than contract.max_prompt_chars"
    COMPLETION_TOO_SHORT = (
        "completion_too_short",
        "the completion has fewer characters than contract.min_completion_chars",
    )
    COMPLETION_TOO_LONG = (
        "completion_too_long",
        "the completion has more characters than contract.max_completion_chars",
    )
    EXACT_DUPLICATE = "exact_duplicate", "the same group and messages as an earlier row, which is kept"


_MEANING = {str(reason): reason.explanation for reason in Reason}


def reason_table(path: Path) -> list[dict[str, str | int]]:
    """Rows per reason, most frequent first, with explanations. A row with two reasons counts twice."""
    return [
        {"reason": name, "rows": count, "meaning": _MEANING[name]}
        for name, count in parquet.count_reasons([path]).items()
    ]


def write_report(path: Path, quarantine: Path, read: int, warnings: dict[str, int]) -> None:
    """Writes quarantine.md: counts per reason, and up to three examples of each.

    Args:
        read: Rows of the snapshot.
        warnings: Rows per warning; these rows were accepted.
    """
    rows = parquet.count_rows([quarantine])
    found = reason_table(quarantine)
    examples: dict[str, list[str]] = {str(entry["reason"]): [] for entry in found}
    for row in parquet.read_rows([quarantine]):
        for reason in row["reasons"]:
            if len(examples[reason]) < EXAMPLES:
                examples[reason].append(f"- `{row['file']}:{row['line']}` {_code(row['raw'])}")
        if all(len(e) >= min(EXAMPLES, int(entry["rows"])) for entry, e in zip(found, examples.values())):
            break
    lines = [
        "# Quarantine",
        "",
        f"{rows:,} of {read:,} rows ({rows / max(1, read):.2%}) were rejected. A row may have several reasons.",
        "",
    ]
    if found:
        lines += ["| reason | rows | meaning |", "| --- | ---: | --- |"]
        lines += [f"| {e['reason']} | {e['rows']:,} | {e['meaning']} |" for e in found]
        for entry in found:
            lines += ["", f"## {entry['reason']}", "", *examples[str(entry["reason"])]]
    if warnings:
        lines += ["", "## Warnings on accepted rows", "", "| warning | rows |", "| --- | ---: |"]
        lines += [
            f"| {_code(name)} | {count:,} |"
            for name, count in sorted(warnings.items(), key=lambda w: (-w[1], w[0]))
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _code(raw: str, limit: int = 240) -> str:
    """Text as Markdown code on one line, shortened."""
    text = " ".join(raw[: limit + 1].split()).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    more = f" … ({len(raw):,} characters)" if len(raw) > limit else ""
    return f"{fence} {text} {fence}{more}" if "`" in text else f"{fence}{text}{fence}{more}"

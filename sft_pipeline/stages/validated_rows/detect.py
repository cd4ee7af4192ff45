"""The format that rows have, by their keys: for `format: auto`."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.stages.validated_rows.formats import MappedFields
from sft_pipeline.stages.validated_rows.normalized_row import MISSING

# What a row must have, the more telling first. A list stands for turns.
NEEDS: dict[str, dict[str, type]] = {
    "messages": {"messages": list},
    "sharegpt": {"conversations": list},
    "instruction": {"instruction": str, "output": str},
    "dolly": {"instruction": str, "response": str},
    "question_response": {"question": str, "response": str},
    "prompt_completion": {"prompt": object, "completion": object},
    "turns": {"role": str, "content": object},
}
OTHER_NAMES = {"role": "from", "content": "value"}
ENOUGH = 0.9  # of the rows that are looked at


def format_of(row: dict[str, Any], columns: Mapping[str, str]) -> str | None:
    """The first format whose fields a row has; None where it has those of none."""
    fields = MappedFields(row, columns)

    def has(name: str, kind: type) -> bool:
        value = fields.get(name)
        if value is MISSING and name in OTHER_NAMES:
            value = fields.get(OTHER_NAMES[name])
        return value is not MISSING and value is not None and isinstance(value, kind)

    return next((f for f, needs in NEEDS.items() if all(has(n, k) for n, k in needs.items())), None)


def detect_format(rows: Iterable[dict[str, Any]], columns: Mapping[str, str], what: str) -> str:
    """The format that nearly all rows have.

    Args:
        what: The source, for messages: "sources[0]".

    Raises:
        InputError: They have none, or several; the message names the columns there are.
    """
    found: Counter[str | None] = Counter()
    keys: Counter[str] = Counter()
    for row in rows:
        found[format_of(row, columns)] += 1
        keys.update(row)
    total = found.total()
    if not total:
        raise InputError(f"{what}: no rows whose format could be seen")
    best, count = found.most_common(1)[0]
    if best is not None and count >= ENOUGH * total:
        return best
    names = ", ".join(name for name, _ in keys.most_common(12))
    seen = ", ".join(f"{f or 'none'} {n:,}" for f, n in found.most_common())
    raise InputError(
        f"{what}: format: auto finds no format that {ENOUGH:.0%} of the first {total:,} rows have ({seen}). "
        f"They have the columns {names}: set `format`, and map its fields with `columns`"
    )

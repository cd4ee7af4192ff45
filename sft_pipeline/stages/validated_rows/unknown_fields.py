"""Keys of a row that no format reads: counted, or a reason to reject the row.

Most are harmless: ids, scores, dates. A few would change what is trained if they were read: images, or a
known field under another spelling. Such a row is rejected with the key's name, unless the key is mapped by
`columns` or named under the source's `unused`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sft_pipeline.stages.validated_rows.config import FIELDS
from sft_pipeline.stages.validated_rows.formats import REASONING, WEIGHT_KEYS
from sft_pipeline.stages.validated_rows.normalized_row import MESSAGE_FIELDS, NO_VALUE

_OF_MESSAGES = ("messages", "sharegpt", "prompt_completion")  # formats whose rows hold lists of messages
_TURN = ("role", "from", "content", "value", "function_call", *MESSAGE_FIELDS, *REASONING, *WEIGHT_KEYS)
_ROW = ("tools", "functions", "system")
# Content that a model of text cannot be shown.
_NOT_TEXT = ("image", "audio", "video")
# Names that mean one of the fields above, in any spelling.
_MEANT = {
    "row": (*_ROW, "tool_calls", "system_prompt", "loss_weight", "train", *_NOT_TEXT),
    "message": (*_TURN, "thought", "tools", *_NOT_TEXT),
}


def _plain(name: str) -> str:
    """A name without case, separators and a plural's s."""
    return "".join(c for c in name.lower() if c.isalnum()).rstrip("s")


_SUSPICIOUS = {level: {_plain(name) for name in names} for level, names in _MEANT.items()}


class UnknownFields:
    """Finds them in the rows of one source, and counts them. Keys recur, so each set of keys is judged once.

    Args:
        format_, columns: As the dataset file has them.
        others: Columns that something else reads (the group key, the time).
        unused: Columns that the dataset file declares unused.

    Attributes:
        counts: Rows (or messages, for "messages[].KEY") by key.
    """

    def __init__(
        self, format_: str, columns: Mapping[str, str], others: Sequence[str], unused: Sequence[str]
    ) -> None:
        self.counts: Counter[str] = Counter()
        of_turns = ("role", "content", "from", "value", "reasoning_content")
        fields = [*(f for f in FIELDS[format_] if f not in of_turns), "tools", "functions"]
        if format_ not in ("messages", "sharegpt"):  # there, reasoning stands in the messages
            fields += REASONING
        read = {columns.get(name, name) for name in fields}
        roots = {column.split(".")[0] for column in (*read, *columns.values(), *others) if column}
        self._row_known = read | roots | set(unused)
        self._turn_known = {*_TURN, *columns.values(), *(u.removeprefix("messages[].") for u in unused)}
        self._lists = [
            columns.get(name, name)
            for name in ("messages", "conversations", "prompt", "completion")
            if format_ in _OF_MESSAGES and name in FIELDS[format_]
        ]
        self._judged: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}

    def find(self, row: Mapping[str, Any]) -> Iterator[str]:
        """The fields for which the row has to be rejected; all others that are unknown are counted."""
        unknown, suspicious = self._judge(tuple(row), self._row_known, "row")
        self.counts.update(unknown)
        yield from (name for name in suspicious if row[name] not in NO_VALUE)
        for column in self._lists:
            turns = row.get(column)
            for turn in turns if isinstance(turns, list) else ():
                if isinstance(turn, dict) and len(turn) > 2:
                    unknown, suspicious = self._judge(tuple(turn), self._turn_known, "message")
                    self.counts.update(f"messages[].{name}" for name in unknown)
                    yield from (name for name in suspicious if turn[name] not in NO_VALUE)

    def _judge(self, keys: tuple[str, ...], known: set[str], level: str) -> tuple[list[str], list[str]]:
        found = self._judged.get((level, *keys))
        if found is None:
            strange = [key for key in keys if key not in known]
            suspicious = [key for key in strange if _plain(key) in _SUSPICIOUS[level]]
            found = [key for key in strange if key not in suspicious], suspicious
            self._judged[(level, *keys)] = found
        return found

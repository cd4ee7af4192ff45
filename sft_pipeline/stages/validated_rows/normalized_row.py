"""A row as messages, tools and reasons: what every format is turned into."""

from typing import Any

from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import MESSAGE

MISSING: Any = object()
MESSAGE_FIELDS = tuple(field.name for field in MESSAGE)
NO_VALUE: tuple[Any, ...] = (None, "", "null", "[]", [], {})
EMPTY_MESSAGE = dict.fromkeys(MESSAGE_FIELDS)

Message = dict[str, Any]


class NormalizedRow:
    """A row's messages, tools and reasons. A message whose content is None has a reason already."""

    __slots__ = ("details", "messages", "reasons", "tools")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.tools: str | None = None
        self.reasons: list[str] = []
        self.details: list[str] = []

    def reject(self, reason: RejectReason, field: str | None = None, detail: str = "") -> None:
        """Adds a reason.

        Args:
            field: A name that makes it a reason of its own, counted apart.
            detail: What of the row it is about.
        """
        text = f"{reason}: {field}" if field else str(reason)
        if text not in self.reasons:
            self.reasons.append(text)
            self.details.append(detail)

    def add(self, role: str, content: str | None, **others: Any) -> None:
        """Adds a message. Args: others: Of the fields of `MESSAGE`."""
        self.messages.append({**EMPTY_MESSAGE, "role": role, "content": content, **others})

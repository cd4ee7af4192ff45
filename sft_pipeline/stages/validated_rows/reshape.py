"""What a dataset file says is to be done to a source's rows before their format is read.

In this order: `where` keeps rows, `transform` makes one, several or none of each, `text` adds columns.
"""

import string
from collections.abc import Iterator, Mapping
from typing import Any

from sft_pipeline.row_conditions import ConditionFailed, compile_condition
from sft_pipeline.stages.validated_rows.config import Reshaping
from sft_pipeline.stages.validated_rows.formats import look_up
from sft_pipeline.stages.validated_rows.normalized_row import MISSING
from sft_pipeline.tables.reasons import RejectReason
from sft_pipeline.tables.schemas import derived_row_id
from sft_pipeline.user_code import import_function

LONGEST_DETAIL = 200  # characters


class CannotReshape(Exception):
    """A row is left out: (reason, what of it)."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:LONGEST_DETAIL]


class Reshaper:
    """Reshapes the rows of one source.

    Args:
        what: The source, for messages: "sources[0]".

    Raises:
        InputError: The transform cannot be imported.
    """

    def __init__(self, shape: Reshaping, what: str) -> None:
        self._keeps = compile_condition(shape.where) if shape.where else None
        self._name = shape.transform
        self._transform = import_function(f"{what}.transform", self._name) if self._name else None
        self._texts = {column: list(string.Formatter().parse(t)) for column, t in shape.text.items()}
        self.is_needed = bool(self._keeps or self._transform or self._texts)

    def __call__(self, row_id: str, row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(row id, row) of each row that a row of the source becomes.

        Raises:
            CannotReshape: It becomes none.
        """
        try:
            if self._keeps and not self._keeps(row):
                raise CannotReshape(RejectReason.NOT_SELECTED, "where")
        except ConditionFailed as error:
            raise CannotReshape(RejectReason.NOT_RESHAPED, f"where: {error}") from None
        made = self._transformed(row) if self._transform else [row]
        for number, each in enumerate(made):
            yield derived_row_id(row_id, number, len(made)), self._with_texts(each)

    def _transformed(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        assert self._transform is not None
        try:
            found = self._transform(row)
        except (Exception, SystemExit) as error:
            said = f"{self._name} raised {type(error).__name__}: {error}"
            raise CannotReshape(RejectReason.NOT_RESHAPED, said) from None
        if found is None or found == []:
            raise CannotReshape(RejectReason.NOT_SELECTED, f"{self._name} returned {found}")
        rows = found if isinstance(found, list) else [found]
        if odd := [type(r).__name__ for r in rows if not isinstance(r, dict)]:
            raise CannotReshape(RejectReason.NOT_RESHAPED, f"{self._name} returned {odd[0]}, not a dict")
        return rows

    def _with_texts(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self._texts:
            return row
        return row | {column: "".join(_filled(parts, row)) for column, parts in self._texts.items()}


def columns_in(texts: Mapping[str, str]) -> set[str]:
    """The columns that stand in braces."""
    return {name for t in texts.values() for _, name, _, _ in string.Formatter().parse(t) if name}


def _filled(
    parts: list[tuple[str, str | None, str | None, str | None]], row: Mapping[str, Any]
) -> Iterator[str]:
    for text, name, _, _ in parts:
        yield text
        if name is not None:
            value = look_up(row, name)
            if value is MISSING or value is None:
                raise CannotReshape(RejectReason.MISSING_FIELD, name)
            if isinstance(value, dict | list):
                raise CannotReshape(RejectReason.WRONG_TYPE, name)
            yield value if isinstance(value, str) else str(value)

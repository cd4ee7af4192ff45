"""What grouped_split reads of a dataset file."""

from collections import Counter
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sft_pipeline.config.base import Config


class NearDuplicatesConfig(Config):
    """The search for near-duplicates across splits."""

    threshold: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Jaccard similarity of word 3-grams from which two rows count as near-duplicates",
        ),
    ] = 0.8
    action: Annotated[
        Literal["drop_from_train", "report"],
        Field(
            description="drop train and validation rows that are near-duplicates of a test row, and train "
            "rows that are near-duplicates of a validation row; or only list them"
        ),
    ] = "drop_from_train"
    max_leakage: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="the blocking check fails above this fraction of held-out rows with a "
            "near-duplicate left in another split; null: 0 where rows are dropped, no bound where they are "
            "only reported",
        ),
    ] = None


class FixedGroups(Config):
    """Groups put into a split by hand."""

    train: Annotated[list[str], Field(description="keys of groups that are always in train")] = []
    validation: Annotated[list[str], Field(description="keys of groups that are always in validation")] = []
    test: Annotated[list[str], Field(description="keys of groups that are always in test")] = []

    @model_validator(mode="after")
    def _one_split_each(self) -> Self:
        twice = [g for g, n in Counter([*{*self.train}, *{*self.validation}, *{*self.test}]).items() if n > 1]
        if twice:
            raise ValueError(f"the group {twice[0]!r} is put into two splits")
        return self


class SplitConfig(Config):
    """Splits by group: a pure function of (salt, group)."""

    validation: Annotated[float, Field(ge=0, lt=1, description="fraction of groups")] = 0.1
    test: Annotated[float, Field(ge=0, lt=1, description="fraction of groups")] = 0.1
    salt: Annotated[str, Field(description="another salt assigns the groups anew")] = "salt-v1"
    groups: Annotated[FixedGroups, Field(description="groups fixed by hand; they ignore the salt")] = (
        FixedGroups()
    )
    time_column: Annotated[
        str | None, Field(description="column of the raw rows with an ISO date or time, for time_cutoff")
    ] = None
    time_cutoff: Annotated[
        str | None,
        Field(description="groups whose first row is at or after this ISO time are held out as test"),
    ] = None
    near_duplicates: Annotated[
        NearDuplicatesConfig | None, Field(description="null turns the search off")
    ] = NearDuplicatesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation {self.validation} and test {self.test} leave nothing to train on: together they "
                "must stay below 1"
            )
        if self.time_cutoff is not None:
            if self.time_column is None:
                raise ValueError("time_cutoff needs time_column, the raw rows' column that holds the time")
            try:
                datetime.fromisoformat(self.time_cutoff)
            except ValueError:
                raise ValueError(
                    f"time_cutoff {self.time_cutoff!r} is no ISO date or time, for example 2026-05-20"
                ) from None
        return self

"""What grouped_split reads of a dataset file."""

from typing import Annotated, Literal

from pydantic import Field

from sft_pipeline.config.base import Config


class NearDuplicatesConfig(Config):
    """The search for near-duplicates across sides."""

    threshold: Annotated[float, Field(gt=0, le=1, description="Jaccard similarity of word 3-grams from which two rows count as near-duplicates")] = 0.8
    action: Annotated[Literal["drop_from_train", "report"], Field(description="drop the training-side rows of a straddling cluster, or only list them")] = "drop_from_train"
    max_leakage: Annotated[float, Field(ge=0, le=1, description="the blocking check fails above this fraction of held-out rows with a near-duplicate left in train")] = 0.0


class FixedGroups(Config):
    """Groups put on a side by hand."""

    train: list[str] = []
    validation: list[str] = []
    test: list[str] = []


class SplitConfig(Config):
    """Sides by group: a pure function of (salt, group)."""

    validation: Annotated[float, Field(ge=0, lt=1, description="fraction of groups")] = 0.1
    test: Annotated[float, Field(ge=0, lt=1, description="fraction of groups")] = 0.1
    salt: Annotated[str, Field(description="another salt deals the groups anew")] = "sft-v1"
    groups: Annotated[FixedGroups, Field(description="sides fixed by hand, before the salt is asked")] = FixedGroups()
    time_column: Annotated[str | None, Field(description="column of the raw rows with an ISO date or time, for time_cutoff")] = None
    time_cutoff: Annotated[str | None, Field(description="groups whose first row is at or after this ISO time are held out as test")] = None
    near_duplicates: NearDuplicatesConfig | None = NearDuplicatesConfig()

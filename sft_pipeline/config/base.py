"""The base of every configuration class: unknown keys are errors, instances are immutable."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Strict and frozen; the fields' descriptions go into the JSON Schemas that editors read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """What of it decides the result, as JSON values: all of it, unless a class leaves something out.

        Two configurations of the same identity give the same fingerprint.
        """
        return self.model_dump(mode="json", by_alias=True)

"""The base of every configuration class: unknown keys are errors, instances are immutable."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Strict and frozen; the fields' descriptions go into the JSON Schemas that editors read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

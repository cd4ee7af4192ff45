"""What packed_shards reads of a recipe."""

from typing import Annotated, Literal

from pydantic import Field

from sft_pipeline.config.base import Config


class PackingConfig(Config):
    """How examples share blocks."""

    strategy: Annotated[
        Literal["bfd", "none"],
        Field(description="bfd: best-fit-decreasing of whole examples; none: one example per block"),
    ] = "bfd"


class PackedShardsConfig(Config):
    """Everything packed_shards depends on. `blocks_per_update` counts examples where the strategy is none."""

    packing: PackingConfig
    max_length: int
    blocks_per_update: int
    epochs: int
    seed: int

"""packed_shards as an asset: whole examples packed into blocks, and which blocks form each update."""

from sft_pipeline.stages.packed_shards.config import PackedShardsConfig
from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage


def _config(branch: Branch) -> PackedShardsConfig:
    recipe = branch.require_recipe()
    return PackedShardsConfig(
        packing=recipe.packing,
        max_length=recipe.tokens.max_length,
        blocks_per_update=recipe.training.planned_blocks,
        epochs=recipe.training.epochs,
        seed=recipe.training.seed,
    )


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.packed_shards.build import build

    return build


STAGE = Stage(
    name="packed_shards",
    description="Whole examples packed into blocks with their boundaries, and the update plan of all epochs, "
    "balanced by supervised tokens.",
    kinds=frozenset({"parquet"}),
    inputs=("tokenized_rows",),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec("every_row_packed_once", True, "every tokenized row is in exactly one block"),
        CheckSpec("boundaries_restart", True, "position ids restart at 0 at each example"),
        CheckSpec(
            "labels_match_inputs",
            True,
            "labels equal input ids wherever supervised, and no example's first position is",
        ),
        CheckSpec(
            "plan_covers_every_block", True, "every epoch of the plan holds every training block exactly once"
        ),
        CheckSpec(
            "packing_efficiency",
            False,
            "blocks are at least 90 % full on average (where there are 50 or more)",
        ),
        CheckSpec(
            "balanced_updates",
            False,
            "supervised tokens per update vary by at most 10 % (coefficient of variation over updates of "
            "equal size)",
        ),
    ),
)

"""grouped_split as an asset."""

from sft_pipeline.stages.stage import BuildFunction, CheckSpec, Stage


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.grouped_split.build import build

    return build


STAGE = Stage(
    name="grouped_split",
    description="train, validation and test by group. The split is a function of (salt, group), so no later "
    "snapshot moves a group; rows that resemble a held-out one are dropped from train.",
    kinds=frozenset({"parquet"}),
    inputs=("validated_rows",),
    config=lambda branch: branch.dataset.split,
    load_build=_load_build,
    checks=(
        CheckSpec(
            "group_overlap",
            blocking=True,
            description="No group is in two splits, as read back from the written files",
        ),
        CheckSpec(
            "near_duplicate_leakage",
            blocking=True,
            description="The fraction of held-out rows with a near-duplicate in another split is within the "
            "bound",
        ),
        CheckSpec(
            "splits_not_empty", blocking=True, description="Every split that should have rows has some"
        ),
        CheckSpec(
            "counts_add_up",
            blocking=True,
            description="train + validation + test + rejects = accepted rows, and the files hold exactly "
            "the rows assigned to them",
        ),
        CheckSpec(
            "fixed_groups_found",
            blocking=False,
            description="Every group that is put into a split by hand is in the data",
        ),
        CheckSpec(
            "split_shares",
            blocking=False,
            description="Validation and test have between half and double the share of rows asked for",
        ),
        CheckSpec(
            "train_rows_kept",
            blocking=False,
            description="At most 20 % of the train rows were dropped as near-duplicates of held-out ones",
        ),
    ),
    packages=("pyarrow",),
    of_dataset=True,
)

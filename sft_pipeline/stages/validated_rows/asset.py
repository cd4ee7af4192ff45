"""validated_rows as an asset."""

from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage
from sft_pipeline.stages.validated_rows.config import SourceShape, ValidatedRowsConfig
from sft_pipeline.user_code import digest_function


def _config(branch: Branch) -> ValidatedRowsConfig:
    dataset = branch.dataset
    shapes = [
        SourceShape(**{name: getattr(source, name) for name in SourceShape.model_fields})
        for source in dataset.sources
    ]
    return ValidatedRowsConfig(
        contract=dataset.contract, shapes=shapes, time_column=dataset.split.time_column
    )


def _outside(branch: Branch) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, source in enumerate(branch.dataset.sources):
        if source.transform:
            found |= digest_function(f"sources[{number}].transform", source.transform)
    return found


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.validated_rows.build import build

    return build


STAGE = Stage(
    name="validated_rows",
    description="Conversations that keep the row contract. Every other row of the snapshot is in "
    "`quarantine.parquet` with all its reasons; `quarantine.md` sums them up.",
    kinds=frozenset({"parquet"}),
    inputs=("raw_rows",),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec(
            "reject_rate",
            blocking=True,
            description="The rejected fraction is within contract.max_reject_rate",
        ),
        CheckSpec("counts_add_up", blocking=True, description="accepted + quarantined = read"),
        CheckSpec("has_rows", blocking=True, description="At least one row was accepted"),
        CheckSpec(
            "columns_there",
            blocking=False,
            description="Every column that the dataset file names is in some row",
        ),
    ),
    outside=_outside,
    packages=("orjson", "pyarrow"),
    of_dataset=True,
)

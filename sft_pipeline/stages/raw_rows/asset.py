"""raw_rows as an asset."""

from sft_pipeline.stages.raw_rows.config import RawRowsConfig, RawSource, ReadSource
from sft_pipeline.stages.raw_rows.locate import source_digests
from sft_pipeline.stages.stage import Branch, BuildFunction, CheckSpec, Stage


def _config(branch: Branch) -> RawRowsConfig:
    return RawRowsConfig(
        sources=[
            ReadSource(
                **{name: getattr(s, name) for name in RawSource.model_fields},
                row_fields=sorted({column.partition(".")[0] for column in s.columns.values()}),
            )
            for s in branch.dataset.sources
        ]
    )


def _load_build() -> BuildFunction:
    from sft_pipeline.stages.raw_rows.build import build

    return build


STAGE = Stage(
    name="raw_rows",
    description="Every row of the snapshot as it is in the source files, with source, file and line. "
    "Nothing is judged; what cannot be decoded is kept in `rejects.parquet`.",
    kinds=frozenset({"parquet"}),
    inputs=(),
    config=_config,
    load_build=_load_build,
    checks=(
        CheckSpec("undecodable_rows", blocking=False, description="Every line of every file can be decoded"),
        CheckSpec("has_rows", blocking=True, description="The snapshot has at least one row"),
    ),
    outside=lambda branch: source_digests(branch.dataset.sources, branch.snapshot),
    packages=("orjson", "pyarrow"),
    of_dataset=True,
)

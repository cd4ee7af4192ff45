"""What raw_rows reads of a dataset file: its sources."""

from typing import Annotated

from pydantic import Field

from sft_pipeline.config.base import Config


class RawSource(Config):
    """Where one source's rows come from and how many of them are taken."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            description="folder, file, glob, fsspec URL or hf://dataset@revision?config=NAME&split=NAME; "
            "relative to the project root",
        ),
    ]
    limit: Annotated[
        int | None,
        Field(ge=1, description="take this many rows, sampled with a fixed seed; the file order is kept"),
    ] = None
    weight: Annotated[
        float,
        Field(
            gt=0,
            description="share in the mixture: where the sources' weights differ, rows are sampled down "
            "until the shares are proportional to the weights; no row is ever repeated",
        ),
    ] = 1.0
    static: Annotated[
        bool,
        Field(
            description="true: one folder or file for every snapshot; false: `path` holds one subfolder per "
            "snapshot"
        ),
    ] = False


class RawRowsConfig(Config):
    """Everything raw_rows depends on."""

    sources: list[RawSource]

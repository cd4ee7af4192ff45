"""What raw_rows reads of a dataset file: its sources."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from sft_pipeline.config.base import Config


class JoinConfig(Config):
    """A second file whose fields are added to a source's rows."""

    files: Annotated[
        str | None,
        Field(
            min_length=1,
            description="names of the second files, such as answers*.jsonl, among those of the source; "
            "they are then no rows of their own",
        ),
    ] = None
    path: Annotated[
        str | None,
        Field(min_length=1, description="instead of `files`: a file or folder, the same for every snapshot"),
    ] = None
    by: Annotated[str, Field(min_length=1, description="column of the source's rows that holds the key")]
    key: Annotated[
        str | None, Field(description="column of the second file that holds the key; null: named as in `by`")
    ] = None
    fields: Annotated[
        dict[str, str],
        Field(
            description="column of the joined row -> column of the second file; empty: all its columns but "
            "the key, under their own names"
        ),
    ] = {}
    required: Annotated[
        bool, Field(description="false: rows without a partner are kept, without the fields")
    ] = True

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.files is None) == (self.path is None):
            raise ValueError("name either `files`, beside the source's own, or a `path`")
        return self

    @property
    def their_key(self) -> str:
        return self.key or self.by


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
    files: Annotated[
        str | None,
        Field(
            min_length=1,
            description="names of the files to read in a snapshot's folder, such as *.jsonl or "
            "train/*.csv; the others are listed as not named",
        ),
    ] = None
    join: Annotated[JoinConfig | None, Field(description="fields from a second file, by key")] = None
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


class ReadSource(RawSource):
    """A source as raw_rows reads it.

    Attributes:
        row_fields: Columns of which a .json document that has one as a list is one row, not a list of rows.
    """

    row_fields: list[str] = []


class RawRowsConfig(Config):
    """Everything raw_rows depends on."""

    sources: list[ReadSource]

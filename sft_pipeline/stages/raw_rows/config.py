"""What raw_rows reads of a dataset file: its sources."""

import difflib
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from sft_pipeline.config.base import Config

Format = Literal["messages", "prompt_completion", "instruction", "sharegpt", "dolly", "question_response"]


_TURNS = ("role", "content", "from", "value", "tools", "system")
FIELDS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", *_TURNS),
    "prompt_completion": ("prompt", "completion", *_TURNS),
    "instruction": ("instruction", "input", "output", "system", "history", "tools"),
    "sharegpt": ("conversations", *_TURNS),
    "dolly": ("instruction", "context", "response", "tools"),
    "question_response": ("system_prompt", "question", "response", "tools"),
}
"""What `columns` may map, by format; `group` besides."""
assert set(FIELDS) == set(get_args(Format))


class RawSource(Config):
    """Where one source's rows come from and how many of them are taken."""

    path: Annotated[
        str,
        Field(
            min_length=1,
            description="folder, file, glob, fsspec URL or hf://dataset@revision?config=NAME&split=NAME; relative to the project root",
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
            description="share in the mixture: where the sources' weights differ, rows are sampled down until the shares are proportional to the weights; no row is ever repeated",
        ),
    ] = 1.0
    static: Annotated[
        bool,
        Field(
            description="true: one folder or file for every snapshot; false: `path` holds one subfolder per snapshot"
        ),
    ] = False


class SourceConfig(RawSource):
    """One source of rows."""

    format: Annotated[Format, Field(description="shape of the rows")] = "prompt_completion"
    columns: Annotated[
        dict[str, str],
        Field(
            description="field of the format (or `group`) -> the source's own column; a dotted path reaches into objects and lists, for example prompt.replies.0.text"
        ),
    ] = {}

    @model_validator(mode="after")
    def _columns_known(self) -> Self:
        known = ("group", *FIELDS[self.format])
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"columns: the format {self.format} has no field {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {', '.join(known)}"
                )
        return self


class RawRowsConfig(Config):
    """Everything raw_rows depends on."""

    sources: list[RawSource]

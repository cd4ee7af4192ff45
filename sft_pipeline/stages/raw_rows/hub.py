"""`hf://dataset@revision?config=NAME&split=NAME`: rows of a Hugging Face dataset, or of a local folder of one.

The revision is required: an artifact must be made of something that does not move. A branch or tag is resolved to its
commit when the fingerprint is taken.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file
from sft_pipeline.project import project_path
from sft_pipeline.stages.raw_rows.decode import Bad, Row
from sft_pipeline.stages.raw_rows.readers import table_rows

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubDataset:
    """A dataset at a revision. `folder` is set where it lies on this machine."""

    name: str
    revision: str
    config: str | None
    split: str | None

    @property
    def folder(self) -> Path | None:
        path = project_path(self.name)
        return path if path.is_dir() else None


def is_hub(path: str) -> bool:
    return path.startswith("hf://")


def parse_hub(path: str) -> HubDataset:
    """Raises:
    InputError: No revision, or an unknown option.
    """
    address, _, query = path.removeprefix("hf://").partition("?")
    name, _, revision = address.rpartition("@")
    if not name or not revision:
        raise InputError(
            f"{path}: add the revision, as in hf://owner/dataset@COMMIT: a dataset that may change cannot be traced"
        )
    options = dict(parse_qsl(query))
    if unknown := sorted(options.keys() - {"config", "split"}):
        raise InputError(f"{path}: unknown option {unknown[0]}; known are config and split")
    return HubDataset(name, revision, options.get("config"), options.get("split"))


def hub_digests(path: str) -> dict[str, str]:
    """{file: sha256} of a local folder, else {path: revision}; the hub's commit ids are content digests.

    Raises:
        InputError: A branch or tag that cannot be resolved now.
    """
    dataset = parse_hub(path)
    if dataset.folder:
        files = sorted(
            p
            for p in dataset.folder.rglob("*")
            if p.is_file() and not any(x.startswith(".") for x in p.relative_to(dataset.folder).parts)
        )
        return {
            f"{dataset.name.rstrip('/')}/{p.relative_to(dataset.folder).as_posix()}": digest_file(p)
            for p in files
        }
    if _COMMIT.fullmatch(dataset.revision):
        return {path: f"commit:{dataset.revision}"}
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset.name, revision=dataset.revision).sha
    except Exception as error:
        raise InputError(
            f"{path}: cannot resolve the revision {dataset.revision} ({error.__class__.__name__}); give the 40-digit commit instead"
        ) from error
    return {path: f"commit:{commit}"}


def read_hub(path: str) -> Iterator[Row | Bad]:
    """The rows of one split, streamed through `datasets`. The split is `train`, or the only one, unless named.

    Raises:
        InputError: The dataset, its configuration or split is not found, or cannot be read.
    """
    from datasets import load_dataset

    dataset = parse_hub(path)
    try:
        splits: Any = load_dataset(
            str(dataset.folder or dataset.name), dataset.config, revision=dataset.revision, streaming=True
        )
    except (
        Exception
    ) as error:  # `datasets` raises many kinds, all of which mean that this address gives no data
        raise InputError(
            f"{path}: cannot be loaded: {str(error).splitlines()[0] if str(error) else error.__class__.__name__}"
        ) from error
    name = dataset.split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if name not in splits:
        raise InputError(f"{path}: no split {name}; add ?split=NAME with one of {', '.join(splits)}")
    rows = table_rows(iter(splits[name]))
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise InputError(
                f"{path}: reading stopped: {str(error).splitlines()[0] if str(error) else error.__class__.__name__}"
            ) from error
        if row is None:
            return
        yield row

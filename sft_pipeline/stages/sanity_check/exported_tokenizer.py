"""Whether a server that loads the exported tokenizer encodes the rows' texts as training does.

For some architectures AutoTokenizer takes a class of its own and rebuilds the tokenizer by it, whatever
tokenizer_config.json says. Which architecture it is stands in the base's config.json, and that the export
takes along; tokenized_rows knows only what lies beside the tokenizer.
"""

import shutil
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import read_batches
from sft_pipeline.tables.schemas import SPLITS
from sft_pipeline.text.auto_tokenizer import AutoTokenizerRequest, ask_auto_tokenizer
from sft_pipeline.text.exported_tokenizer import remedy, write_tokenizer
from sft_pipeline.text.find_template import end_ids, load_template
from sft_pipeline.text.tokenizer import load_tokenizer
from sft_pipeline.training.base import base_folder

TEXTS = 64  # of each split


def compare_exported_tokenizer(
    config: SanityCheckConfig, tokenized: Artifact
) -> tuple[bool, str, list[dict[str, Any]]]:
    """(whether the ids of some rows' texts are those of training, in words, the texts with other ids)."""
    tokenizer = load_tokenizer(config.tokenizer, config.tokenizer_revision)
    template = load_template(config.template["chat_template"], tokenizer, config.template["variables"])
    texts = [tokenizer.decode(ids) for split in SPLITS for ids in _first_ids(tokenized, split)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pad = min(end_ids(tokenizer, template), default=0)
        write_tokenizer(tokenizer, template.text, folder, pad_id=pad)
        shutil.copyfile(base_folder(config.model) / "config.json", folder / "config.json")
        (reply,) = ask_auto_tokenizer([AutoTokenizerRequest(str(folder), texts)])
    if reply.unavailable:
        return False, f"AutoTokenizer cannot load the tokenizer to be exported: {reply.unavailable}", []
    different = [
        {
            "text": text[:80],
            "training": tokenizer.decode(ours[at : at + 8]),
            "AutoTokenizer": tokenizer.decode(theirs[at : at + 8]),
        }
        for text, theirs in zip(texts, map(list, reply.ids), strict=True)
        if (ours := tokenizer.ids(text)) != theirs
        for at in [
            next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        ]
    ]
    if not different:
        return (
            True,
            f"AutoTokenizer, as a server loads the export, encodes the texts of {len(texts)} rows alike.",
            [],
        )
    return (
        False,
        f"beside the config.json of {config.model.base} AutoTokenizer gives other ids on {len(different)} of "
        f"{len(texts)} rows: it takes the class that belongs to that architecture, whatever "
        f"tokenizer_config.json says, and so would every server. {remedy(config.tokenizer)}",
        different,
    )


def _first_ids(tokenized: Artifact, split: str) -> list[list[int]]:
    batches = read_batches(tokenized.parts(split), ["input_ids"], TEXTS)
    return [ids for batch in islice(batches, 1) for ids in batch.column(0).to_pylist()]

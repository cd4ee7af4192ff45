"""The way to the end, tried before the training: a checkpoint of the short run is saved, loaded as evaluation
will load it, exported as exported_model will export it, and loaded again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOutRow, probe_rows
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.reply import formatting_of, stops_and_padding
from sft_pipeline.training.export import ExportSettings, write_and_compare
from sft_pipeline.training.generate import score_nll
from sft_pipeline.training.logits import LOSS_TOLERANCE, free_memory, loss_difference
from sft_pipeline.training.model import inference_dtype, load_for_inference, save_weights
from sft_pipeline.training.process import threads_for

ROWS, ANSWERS, ANSWER_TOKENS = 6, 2, 16


@dataclass(frozen=True)
class SavedTrial:
    """A model as the short run left it, in a folder, and its loss on a few rows before it was saved."""

    checkpoint: Path
    rows: list[HeldOutRow]
    loss: float
    precision: str


def save_trial(
    model: Any, config: SanityCheckConfig, tokenized: Artifact, folder: Path, precision: str
) -> SavedTrial:
    """Saves what is trained of the model into an emptied folder, as a training saves a checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint = folder / "checkpoint"
    rows = probe_rows(tokenized, ROWS)
    loss = _loss(model, rows)
    save_weights(model, checkpoint, config.model)
    return SavedTrial(checkpoint, rows, loss, precision)


def export_trial(saved: SavedTrial, config: SanityCheckConfig, tokenized: Artifact) -> tuple[bool, str]:
    """(whether what is loaded and exported is what was trained, in words). The folder is removed."""
    try:
        return _export(saved, config, tokenized)
    finally:
        shutil.rmtree(saved.checkpoint.parent, ignore_errors=True)


def _export(saved: SavedTrial, config: SanityCheckConfig, tokenized: Artifact) -> tuple[bool, str]:
    free_memory()
    dtype = inference_dtype(saved.precision)
    model = load_for_inference(config.model, saved.checkpoint, dtype=dtype, as_trained=True)
    loss = _loss(model, saved.rows)
    del model
    free_memory()
    tolerance = LOSS_TOLERANCE[saved.precision]
    if not loss_difference(loss, saved.loss) <= tolerance:  # a NaN is not
        return False, (
            f"saved and loaded again, the model of the short run has a loss of {loss:.4f} on "
            f"{len(saved.rows)} rows instead of {saved.loss:.4f}: not what is trained would be judged"
        )
    stop_ids, pad_id = stops_and_padding(formatting_of(tokenized))
    settings = ExportSettings(
        config.model,
        config.export.merge or config.model.parameterization == "full",
        config.export.dtype,
        sorted(stop_ids),
        pad_id,
        {"temperature": 0.0, "top_p": 1.0},
    )
    folder = saved.checkpoint.with_name("merged") if settings.merge else saved.checkpoint
    proof = write_and_compare(
        settings,
        saved.checkpoint,
        folder,
        [row.prompt + row.target for row in saved.rows],
        [row.prompt for row in saved.rows[:ANSWERS]],
        ANSWER_TOKENS,
    )
    same = proof.before == proof.after
    answers = "" if same else "; loaded again it answers otherwise"
    return proof.passed and same, f"a checkpoint of the short run: {proof}{answers}"


def _loss(model: Any, rows: list[HeldOutRow]) -> float:
    """NLL per token of what follows the prompts, in nats."""
    examples = [
        (np.array(row.prompt + row.target), np.array([IGNORE_LABEL] * len(row.prompt) + row.target), None)
        for row in rows
    ]
    with threads_for(model):
        nll, tokens = zip(*score_nll(model, examples))
    return sum(nll) / max(1.0, sum(tokens))

"""One update of the real trainer, its gradients kept, beside those of the float64 reference.

python -m sft_pipeline_tests.training.one_update BASE OUT KINDS_JSON        (or under torchrun)

Writes OUT/<kind>.found.safetensors and OUT/<kind>.expected.safetensors.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sft_pipeline.training.base import load_tokenizer
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline.training.data import make_feed
from sft_pipeline.training.model import load_for_training
from sft_pipeline.training.progress import Listener
from sft_pipeline.training.schedule import Schedule
from sft_pipeline.training.shards import Plan, Shards
from sft_pipeline.training.trainer import SupervisedTrainer
from sft_pipeline_tests.training import tiny
from sft_pipeline_tests.training.reference import Gradients, away_from_zero, gradients, reference


class Keeping(SupervisedTrainer):
    """Keeps the gradients of the update before they are clipped."""

    kept: Gradients

    def _clip_grad_norm(self, model: Any) -> Any:
        self.kept = {n: g.clone() for n, g in gradients(self.model).items()}
        return super()._clip_grad_norm(model)


def main(base: Path, out: Path, kinds: list[str], weights: bool = False) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = out / f"rank{rank}"
    packed = tiny.packed_shards(own / "packed", per_update=6, epochs=1, weights=weights)
    plan, shards = Plan(packed.file("plan.parquet")), Shards(packed.parts("train"))
    members = {row for block in plan.blocks(0) for row in shards.row_ids(int(block))}
    given = tiny.weighed(tiny.examples(48)) if weights else tiny.examples(48)
    rows = [row for row in given if row["row_id"] in members]
    training = TrainingConfig(per_device_batch=1)  # several micro-batches on each rank
    for kind in kinds:
        config = ModelConfig(base=str(base), parameterization=kind, lora={"r": 4, "dropout": 0.0})  # type: ignore[arg-type]
        model, loaded = load_for_training(config, training)
        away_from_zero(model)
        if rank == 0:
            save_file(reference(model, rows)[1], str(out / f"{kind}.expected.safetensors"))
        trainer = Keeping(
            model,
            feed=make_feed(shards, plan, training, layout="rows", updates=1, rank=rank, world=world),
            validation=None,
            tokenizer=load_tokenizer(config),
            training=training,
            schedule=Schedule.of(training, config),
            precision=loaded.precision,
            folder=own / "trainer",
            listener=Listener(),
        )
        trainer.run()
        if rank == 0:
            save_file(trainer.kept, str(out / f"{kind}.found.safetensors"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), "weights" in sys.argv)

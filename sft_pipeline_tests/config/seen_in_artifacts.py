"""What a key changes of what the stages make: rows, tensors, plans, curves, scores, files.

Each function gives an observation, as in `seen_in_libraries.py`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.tables.parquet import read_rows
from sft_pipeline.tables.schemas import SPLITS
from sft_pipeline_tests.config.every_key import Observation, Side, Workshop

# Rows of a dataset


def rows_of(shop: Workshop, side: Side, stage: str, split: str) -> list[dict[str, Any]]:
    return list(read_rows(shop.artifact(side, stage).parts(split)))


def count(stage: str, name: str) -> Observation:
    """One of the counts in a stage's manifest."""
    return lambda shop, side: shop.artifact(side, stage).manifest.counts[name]


def check(stage: str, name: str) -> Observation:
    """Whether a check of a stage passed."""

    def seen(shop: Workshop, side: Side) -> bool:
        checks = shop.artifact(side, stage).manifest.checks
        return next(c["passed"] for c in checks if c["name"] == name)

    return seen


def asset_name(shop: Workshop, side: Side) -> str:
    return shop.artifact(side, "raw_rows").manifest.asset


def snapshot_count(_: Workshop, side: Side) -> int:
    return len(snapshots(side.dataset.sources))


def rows_by_source(shop: Workshop, side: Side) -> list[int]:
    found = [row["source"] for row in rows_of(shop, side, "raw_rows", "rows")]
    return [found.count(i) for i in range(len(side.dataset.sources))]


def rejections(shop: Workshop, side: Side) -> list[str]:
    """The reasons that are in quarantine."""
    found = read_rows([shop.artifact(side, "validated_rows").file("quarantine.parquet")])
    return sorted({reason for row in found for reason in row["reasons"]})


def conversations(shop: Workshop, side: Side) -> list[list[str]]:
    """The contents of the turns of each accepted row."""
    rows = rows_of(shop, side, "validated_rows", "rows")
    return [[message["content"] for message in row["messages"]] for row in rows]


def times(shop: Workshop, side: Side) -> set[str | None]:
    return {row["time"] for row in rows_of(shop, side, "validated_rows", "rows")}


def split_of(group: str) -> Observation:
    """The split in whose files a group is."""

    def seen(shop: Workshop, side: Side) -> str | None:
        holding = [s for s in SPLITS if any(r["group"] == group for r in _split(shop, side, s))]
        return holding[0] if holding else None

    return seen


def groups_in(split: str) -> Observation:
    return lambda shop, side: sorted({row["group"] for row in _split(shop, side, split)})


def number_of_groups_in(split: str) -> Observation:
    return lambda shop, side: len({row["group"] for row in _split(shop, side, split)})


def _split(shop: Workshop, side: Side, split: str) -> Iterator[dict[str, Any]]:
    return read_rows(shop.artifact(side, "grouped_split").parts(split))


# Rows as they are tokenized and packed


def of_text(words: str, *, supervised: bool = False) -> Observation:
    """Whether the first training row has these words, or has them where the loss is."""

    def seen(shop: Workshop, side: Side) -> bool:
        from transformers import AutoTokenizer

        row = rows_of(shop, side, "tokenized_rows", "train")[0]
        ids = [t for t in row["labels"] if t != -100] if supervised else row["input_ids"]
        return words in AutoTokenizer.from_pretrained(shop.root / side.recipe.tokenizer).decode(ids)

    return seen


def vocabulary_of_the_rows(shop: Workshop, side: Side) -> int:
    return json.loads(shop.artifact(side, "tokenized_rows").file("formatting.json").read_text())["vocab_size"]


def examples_share_blocks(shop: Workshop, side: Side) -> bool:
    return any(len(b["seq_lengths"]) > 1 for b in rows_of(shop, side, "packed_shards", "train"))


def plan(shop: Workshop, side: Side) -> list[dict[str, Any]]:
    return pq.read_table(shop.artifact(side, "packed_shards").file("plan.parquet")).to_pylist()


def epochs_of_the_plan(shop: Workshop, side: Side) -> int:
    return len({row["epoch"] for row in plan(shop, side)})


def most_blocks_of_an_update(shop: Workshop, side: Side) -> int:
    return max(Counter(row["update"] for row in plan(shop, side)).values())


def order_of_blocks(shop: Workshop, side: Side) -> list[int]:
    return [row["block"] for row in plan(shop, side)]


def blocks_of_a_micro_batch(shop: Workshop, side: Side) -> int:
    """Rows of the first tensor that a GPU would be given."""
    from sft_pipeline.training.data import make_feed
    from sft_pipeline.training.shards import Plan, Shards

    packed = shop.artifact(side, "packed_shards")
    training = side.config("trained_checkpoints").training
    shards, planned = Shards(packed.parts("train")), Plan(packed.file("plan.parquet"))
    feed = make_feed(shards, planned, training, layout="packed", updates=1)
    return feed.update(0).microbatches[0].inputs["input_ids"].shape[0]


# Sanity check and training


def of_sanity(look: Callable[[dict[str, Any]], Any]) -> Observation:
    """Something of sanity.json."""

    def seen(shop: Workshop, side: Side) -> Any:
        return look(json.loads(shop.artifact(side, "sanity_check").file("sanity.json").read_text()))

    return seen


def of_training(look: Callable[[Path], Any]) -> Observation:
    """Something of the files that a training leaves."""
    return lambda shop, side: look(shop.artifact(side, "trained_checkpoints").path)


def curve(folder: Path, name: str) -> dict[int, float]:
    rows = pq.read_table(folder / "history.parquet").to_pylist()
    return {row["step"]: row["value"] for row in rows if row["name"] == name}


def rate(update: int) -> Observation:
    """The learning rate with which an update was made."""
    return of_training(lambda folder: curve(folder, "learning_rate")[update])


def updates_made(folder: Path) -> int:
    return len(curve(folder, "loss"))


def evaluated_after(folder: Path) -> list[int]:
    return list(curve(folder, "val_loss"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def event_files(folder: Path) -> int:
    """TensorBoard's."""
    return len(list((folder / "tensorboard").rglob("events*")))


# Evaluation and export


def score(grader: str, reply: str, completion: str = "") -> Observation:
    """What one of the recipe's graders gives for a reply."""

    def seen(_: Workshop, side: Side) -> float:
        from sft_pipeline.graders.graders import make_graders

        [found] = [g for g in make_graders(side.config("evaluation").evaluation.graders) if g.name == grader]
        return found(reply, completion, {})

    return seen


def of_evaluation(look: Callable[[dict[str, Any]], Any]) -> Observation:
    """Something of evaluation.json."""

    def seen(shop: Workshop, side: Side) -> Any:
        return look(json.loads(shop.artifact(side, "evaluation").file("evaluation.json").read_text()))

    return seen


def compared(name: str) -> Observation:
    """Whether a measure of this name was compared on the test split."""
    return of_evaluation(lambda found: name in found["comparison"])


def replies(shop: Workshop, side: Side) -> list[str]:
    return pq.read_table(shop.artifact(side, "evaluation").file("samples.parquet"))["reply"].to_pylist()


def of_export(look: Callable[[Path], Any]) -> Observation:
    """Something of the exported files."""
    return lambda shop, side: look(shop.artifact(side, "exported_model").path)


def merged_dtype(folder: Path) -> str:
    return json.loads((folder / "merged" / "config.json").read_text())["dtype"]


def has_merged_weights(folder: Path) -> bool:
    return (folder / "merged" / "model.safetensors").is_file()


def licence_of_the_card(folder: Path) -> str | None:
    from huggingface_hub import ModelCard

    return ModelCard((folder / "README.md").read_text()).data.license

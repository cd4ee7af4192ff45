"""The work that is measured, one function per system, each in a process of its own: `-m plane.systems`.

A system imports what it needs, then hands back its work as a function, so that only the work is timed; the
work in turn hands back a function that counts what came out, which is not timed either.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Work = Callable[[], Callable[[], Figures]]
BATCH_TEXTS = 8_192


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        system: A key of `SYSTEMS`. rows: The folder that `rows.write` filled; for snapshots, the folder that
        holds one such folder per snapshot. tokenizer: A tokenizer's folder. scratch: A folder for everything
        that the system writes: a fresh one each time, except where a store is to be
            used again.
        max_length: Tokens per block; what is longer is truncated.
        options: Of `pipeline` only: `near_duplicates` and `snapshot`.
    """

    system: str
    rows: str
    tokenizer: str
    scratch: str
    max_length: int
    options: dict[str, Any] = field(default_factory=dict)


def pipeline(job: Job) -> Work:
    """raw_rows to packed_shards into the store at `scratch`, in this process and its workers."""
    from sft_pipeline.config.dataset import DatasetConfig
    from sft_pipeline.config.recipe import RecipeConfig
    from sft_pipeline.reporting import Reporter
    from sft_pipeline.stages.graph import STAGES
    from sft_pipeline.stages.raw_rows.locate import snapshots
    from sft_pipeline.stages.run import Run, needed_for, run_until
    from sft_pipeline.stages.stage import Branch
    from sft_pipeline.store import Store

    snapshot = job.options.get("snapshot")
    split: dict[str, Any] = {
        "validation": 0.1,
        "test": 0,
    }  # no test split: every row is packed, as by the peer
    if not job.options.get("near_duplicates", True):
        split["near_duplicates"] = None
    source = {"path": job.rows if snapshot else f"{job.rows}/flat.jsonl", "static": snapshot is None}
    dataset = DatasetConfig.model_validate({"name": "bench", "sources": [source], "split": split})
    recipe = RecipeConfig.model_validate(
        {
            "name": "bench_recipe",
            "dataset": "bench",
            "model": {"base": job.tokenizer},
            "tokens": {"max_length": job.max_length, "overflow": "truncate_answer"},
        }
    )
    for name in needed_for("packed_shards", STAGES):
        importlib.import_module(f"sft_pipeline.stages.{name}.build")

    class Clock(Reporter):
        """Seconds per stage."""

        def __init__(self) -> None:
            self.seconds: dict[str, float] = {}

        def stage(self, asset: str, state: str) -> None:
            name = asset.rpartition("/")[2]
            self.seconds[name] = time.perf_counter() - (0 if state == "started" else self.seconds[name])

    def work() -> Callable[[], Figures]:
        clock = Clock()
        branch = Branch(dataset, snapshot or snapshots(dataset.sources)[-1], recipe)
        outcomes = run_until("packed_shards", STAGES, branch, Run(Store(Path(job.scratch)), clock))

        def figures() -> Figures:
            manifests = {name: outcome.artifact.manifest for name, outcome in outcomes.items()}
            packed = manifests["packed_shards"].counts
            blocks = packed["blocks"] + packed["validation_blocks"]
            return {
                "rows": packed["rows_packed"],
                "tokens": packed["tokens"] + packed["validation_tokens"],
                "blocks": blocks,
                "stages": clock.seconds,
                "counts": {name: m.counts for name, m in manifests.items()},
                "data_versions": {name: m.data_version for name, m in manifests.items()},
            }

        return figures

    return work


def trl(job: Job) -> Work:
    """`load_dataset` of the JSON Lines and SFTTrainer's preparation with packing; caches in `scratch`."""
    import datasets
    import pyarrow.compute as pc
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    shape = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(job.tokenizer)),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = AutoModelForCausalLM.from_config(shape)

    def work() -> Callable[[], Figures]:
        tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
        rows = datasets.load_dataset(
            "json", data_files=f"{job.rows}/messages.jsonl", split="train", cache_dir=job.scratch
        )
        arguments = SFTConfig(
            output_dir=f"{job.scratch}/out",
            packing=True,
            max_length=job.max_length,
            dataset_num_proc=os.cpu_count(),
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)

        def figures() -> Figures:
            packed = trainer.train_dataset
            assert isinstance(packed, datasets.Dataset)
            lengths = packed.data.column("seq_lengths").combine_chunks().flatten()
            return {"rows": len(lengths), "tokens": pc.sum(lengths).as_py(), "blocks": len(packed)}

        return figures

    return work


def encode_batch(job: Job) -> Work:
    """The Rust tokenizer alone over texts in memory: nothing read, rendered, masked or written."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{job.tokenizer}/tokenizer.json")
    with open(f"{job.rows}/flat.jsonl", encoding="utf-8") as stream:
        pairs = [json.loads(line) for line in stream]
    texts = [pair[key] for pair in pairs for key in ("prompt", "completion")]

    def work() -> Callable[[], Figures]:
        tokens = 0
        for start in range(0, len(texts), BATCH_TEXTS):
            batch = tokenizer.encode_batch(texts[start : start + BATCH_TEXTS], add_special_tokens=False)
            tokens += sum(len(encoding) for encoding in batch)
        return lambda: {"rows": len(pairs), "tokens": tokens}

    return work


SYSTEMS: dict[str, Callable[[Job], Work]] = {"pipeline": pipeline, "trl": trl, "encode_batch": encode_batch}


def _main() -> None:
    """Reads a job from standard input; writes its figures to the file named by the first argument."""
    job = Job(**json.load(sys.stdin))
    work = SYSTEMS[job.system](job)
    started = time.time()
    figures = work()
    ended = time.time()
    Path(sys.argv[1]).write_text(
        json.dumps({"started": started, "ended": ended, "seconds": ended - started, **figures()})
    )


if __name__ == "__main__":
    _main()

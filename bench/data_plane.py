"""Raw rows to packed shards, side by side: this pipeline, TRL's own preparation, and the bare tokenizer as the limit.

    python bench/data_plane.py [--rows 5000] [--tokenizer FOLDER] [--source FILE.jsonl] [--rounds 3]

The three take turns on the same rows, so that a machine whose speed drifts drifts for all of them. Times are wall
seconds of fresh stores; the median of the rounds is printed, with rows per second and ratios.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LENGTH = 1024
os.environ.setdefault("SFT_PROJECT_ROOT", str(ROOT))


def synthetic_rows(count: int) -> list[dict[str, str]]:
    """Question and answer pairs of the size of grade-school maths (about 180 tokens with a large vocabulary)."""
    words = [
        "the",
        "a",
        "of",
        "and",
        "in",
        "each",
        "then",
        "costs",
        "has",
        "sold",
        "apples",
        "trains",
        "hours",
        "minutes",
        "total",
        "how",
        "many",
        "left",
        "after",
        "buys",
        "gives",
        "dollars",
    ]
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(
            rng.choice(words) if rng.random() < 0.8 else str(rng.randint(1, 999))
            for _ in range(rng.randint(low, high))
        )

    return [
        {"question": text(30, 60) + "?", "answer": text(50, 110) + f"\n#### {rng.randint(1, 9999)}"}
        for _ in range(count)
    ]


def ours(rows: Path, tokenizer: str) -> None:
    from sft_pipeline.config.dataset import DatasetConfig
    from sft_pipeline.config.recipe import RecipeConfig
    from sft_pipeline.reporting import Reporter
    from sft_pipeline.stages.graph import STAGES
    from sft_pipeline.stages.raw_rows.locate import snapshots
    from sft_pipeline.stages.run import Run, run_until
    from sft_pipeline.stages.stage import Branch
    from sft_pipeline.store import Store

    dataset = DatasetConfig(name="bench", sources=[{"path": str(rows), "static": True, "columns": {"prompt": "question", "completion": "answer"}}],
                            split={"near_duplicates": None})  # fmt: skip
    recipe = RecipeConfig(
        name="bench_recipe", dataset="bench", model={"base": tokenizer}, tokens={"max_length": MAX_LENGTH}
    )
    with tempfile.TemporaryDirectory() as home:
        run_until(
            "packed_shards",
            STAGES,
            Branch(dataset, snapshots(dataset)[-1], recipe),
            Run(Store(Path(home)), Reporter()),
        )


def trl(rows: Path, tokenizer: str) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from trl import SFTConfig, SFTTrainer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    data = datasets.Dataset.from_list([
        {"prompt": [{"role": "user", "content": r["question"]}], "completion": [{"role": "assistant", "content": r["answer"]}]}
        for r in map(json.loads, rows.open())
    ])  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(loaded),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
    )
    with tempfile.TemporaryDirectory() as out:
        SFTTrainer(
            model=AutoModelForCausalLM.from_config(config), train_dataset=data, processing_class=loaded,
            args=SFTConfig(output_dir=out, packing=True, max_length=MAX_LENGTH, bf16=False, use_cpu=True, report_to=[], dataset_num_proc=os.cpu_count()),
        )  # fmt: skip


def bare(rows: Path, tokenizer: str) -> None:
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    pairs = [json.loads(line) for line in rows.open()]
    loaded.encode_batch([p["question"] for p in pairs], add_special_tokens=False)
    loaded.encode_batch([p["answer"] for p in pairs], add_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--tokenizer", default=str(ROOT / "data" / "base_model"))
    parser.add_argument("--source", help="JSON lines with question and answer instead of synthetic rows")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SFT_HOME"] = str(Path(folder) / "home")
        path = Path(folder) / "rows.jsonl"
        rows = (
            [json.loads(line) for line in Path(options.source).read_text().splitlines()]
            if options.source
            else synthetic_rows(options.rows)
        )
        path.write_text(
            "".join(json.dumps({"question": r["question"], "answer": r["answer"]}) + "\n" for r in rows)
        )
        sides: dict[str, Callable[[Path, str], None]] = {
            "sft_pipeline": ours,
            "TRL preparation": trl,
            "bare encode_batch": bare,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for side in sides.values():  # imports and caches, not counted
            side(path, options.tokenizer)
        for _ in range(options.rounds):
            for name, side in sides.items():
                start = time.perf_counter()
                side(path, options.tokenizer)
                seconds[name].append(time.perf_counter() - start)
    print(
        f"{len(rows):,} rows, tokenizer {Path(options.tokenizer).name}, {options.rounds} rounds; {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    )
    mine = statistics.median(seconds["sft_pipeline"])
    print(f"{'':20} {'seconds':>9} {'rows/s':>9}  ratio to sft_pipeline")
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name:20} {median:9.2f} {len(rows) / median:9,.0f}  {median / mine:.2f}")


if __name__ == "__main__":
    main()

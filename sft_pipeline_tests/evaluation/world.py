"""A whole small branch in a store, made in-process: a BPE, a Llama, rows, checkpoints, evaluation."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.store import Artifact, InputEntry, Store
from sft_pipeline.store.files import sha256_file, sha256_json
from sft_pipeline.store.manifest import fingerprint_of_parts
from sft_pipeline.tables.parquet import FileWriter, PartWriter
from sft_pipeline.tables.schemas import REJECTS, ROWS, content_key
from sft_pipeline.training.config import ModelConfig

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SNAPSHOT = "2026-01-01"
RAW = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("content", pa.string()),
    ]
)
SUBJECTS = ("red key", "blue key", "green key", "old badge", "new badge", "side door")
VERBS = ("open", "close", "take", "return", "copy", "lose")


def question(i: int) -> tuple[str, str]:
    """A question and its right answer: opening and returning are approved, anything else is denied."""
    verb, subject = VERBS[i % 6], SUBJECTS[(i // 6) % 6]
    return f"May I {verb} the {subject} {i}?", json.dumps(
        {"decision": "approve" if verb in ("open", "return") else "deny"}
    )


def rows_of(start: int, count: int) -> list[dict[str, Any]]:
    found = []
    for i in range(start, start + count):
        prompt, answer = question(i)
        messages = [
            {"role": "user", "content": prompt, "weight": None, "tool_calls": None},
            {"role": "assistant", "content": answer, "weight": None, "tool_calls": None},
        ]
        found.append(
            {
                "row_id": sha256_json([prompt, answer])[:32],
                "source": 0,
                "file": "rows.jsonl",
                "line": i + 1,
                "group": f"T{i // 2}",
                "messages": messages,
                "tools": None,
                "time": None,
                "warnings": [],
                "content_key": content_key(messages, None),
            }
        )
    return found


def write_base(folder: Path, *, hidden: int = 32) -> Path:
    """A model folder: random Llama, BPE trained on the questions, chat template with generation markers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(question(i)) for i in range(120)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=inner.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost these tiny models more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class World:
    """A store with one branch.

    Attributes:
        root: The project root: `base/` and `snapshots/` lie in it.
    """

    root: Path
    store: Store

    def artifact(
        self,
        name: str,
        owner: str,
        out: Path,
        *,
        inputs: dict[str, Artifact] | None = None,
        built: Built | None = None,
        config: Any = None,
        outside: dict[str, str] | None = None,
        accepted: bool = True,
    ) -> Artifact:
        """Commits a folder as an artifact, as the engine does."""
        inputs = inputs or {}
        built = built or Built(counts={})
        parts: dict[str, Any] = {
            "asset": f"{owner}/{name}",
            "partition": SNAPSHOT,
            "code_version": "c0de",
            "outside": outside or {},
            "packages": {},
        }
        fingerprint = fingerprint_of_parts(
            **parts,
            identity=config or {},
            inputs={k: v.manifest.data_version for k, v in inputs.items()},
            blocking=["blocks"],
        )
        with self.store.building(fingerprint) as staging:
            for path in sorted(out.iterdir()):
                path.rename(staging / path.name)
            return self.store.commit(
                staging,
                volatile=built.volatile,
                fields={
                    **parts,
                    "config": config or {},
                    "identity": None,
                    "inputs": {k: InputEntry(**v.as_input().model_dump()) for k, v in inputs.items()},
                    "accepted": accepted,
                    "counts": dict(built.counts),
                    "checks": [
                        {"name": "blocks", "blocking": True, "passed": accepted, "description": "it holds"}
                    ],
                    "environment": {"python": "3"},
                    "dagster_run_id": "run1",
                    "mlflow_run_id": None,
                },
            )

    def build(
        self,
        function: Any,
        name: str,
        config: Any,
        inputs: dict[str, Artifact],
        report: Reporter | None = None,
    ) -> tuple[Built, Path]:
        """Runs a stage's build function into a fresh folder."""
        out = (
            self.root
            / "out"
            / f"{name}-{len(list((self.root / 'out').glob('*'))) if (self.root / 'out').exists() else 0}"
        )
        out.mkdir(parents=True)
        b = Build(
            config=config,
            inputs=inputs,
            out=out,
            work=self.root / "work" / name,
            report=report or Reporter(),
            snapshot=SNAPSHOT,
            asset=f"recipe/{name}",
        )
        return function(b), out


def dataset(world: World, splits: dict[str, list[dict[str, Any]]]) -> dict[str, Artifact]:
    """raw_rows, validated_rows and grouped_split with these rows; the source file is written too."""
    source = world.root / "snapshots" / SNAPSHOT / "rows.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    every = [r for rows in splits.values() for r in rows]
    source.write_text(
        "".join(
            json.dumps(
                {
                    "thread_id": r["group"],
                    "prompt": r["messages"][0]["content"],
                    "completion": r["messages"][1]["content"],
                }
            )
            + "\n"
            for r in every
        )
    )
    out = world.root / "out"

    def fresh(name: str) -> Path:
        (out / name).mkdir(parents=True)
        return out / name

    folder = fresh("raw_rows")
    with PartWriter(folder / "rows", RAW) as writer:
        writer.append(
            [
                {"row_id": r["row_id"], "source": 0, "file": r["file"], "line": r["line"], "content": "{}"}
                for r in every
            ]
        )
    relative = source.relative_to(world.root).as_posix()
    raw = world.artifact(
        "raw_rows",
        "dataset",
        folder,
        outside={relative: sha256_file(source)},
        built=Built(counts={"rows": len(every)}),
    )
    folder = fresh("validated_rows")
    with PartWriter(folder / "rows", ROWS) as writer:
        writer.append(every)
    with FileWriter(folder / "quarantine.parquet", REJECTS) as writer:
        writer.append(
            [
                {
                    "row_id": "bad1",
                    "source": 0,
                    "file": "rows.jsonl",
                    "line": 999,
                    "reasons": ["empty_completion"],
                    "raw": "{}",
                }
            ]
        )
    validated = world.artifact("validated_rows", "dataset", folder, inputs={"raw_rows": raw})
    folder = fresh("grouped_split")
    for split in ("train", "validation", "test"):
        with PartWriter(folder / split, ROWS) as writer:
            writer.append(splits.get(split, []))
    split = world.artifact("grouped_split", "dataset", folder, inputs={"validated_rows": validated})
    return {"raw_rows": raw, "validated_rows": validated, "grouped_split": split}


def tokenized(
    world: World, split: Artifact, *, tokenizer: str = "base", owner: str = "recipe", **template: Any
) -> Artifact:
    """tokenized_rows by its own build function."""
    from sft_pipeline.stages.tokenized_rows.build import build

    config = TokenizedRowsConfig.model_validate(
        {
            "tokenizer": tokenizer,
            "revision": None,
            "template": {"chat_template": "tokenizer", **template},
            "tokens": {"max_length": 96},
        }
    )
    built, out = world.build(build, "tokenized_rows", config, {"grouped_split": split})
    return world.artifact(
        "tokenized_rows",
        owner,
        out,
        inputs={"grouped_split": split},
        built=built,
        config=config.model_dump(mode="json"),
    )


def packed(world: World, rows: Artifact) -> Artifact:
    """packed_shards with one row a block and one block an update, in the order of the rows."""
    import pyarrow.parquet as pq

    out = world.root / "out" / "packed_shards"
    train = pq.read_table(rows.parts("train")[0]).to_pylist()
    blocks = pa.schema([("block", pa.int32()), ("row_ids", pa.list_(pa.string()))])
    for split in ("train", "validation"):
        with PartWriter(out / split, blocks) as writer:
            writer.append(
                [{"block": i, "row_ids": [r["row_id"]]} for i, r in enumerate(train)]
                if split == "train"
                else []
            )
    with FileWriter(
        out / "plan.parquet",
        pa.schema([("update", pa.int32()), ("position", pa.int32()), ("block", pa.int32())]),
    ) as writer:
        writer.append([{"update": i + 1, "position": 0, "block": i} for i in range(len(train))])
    return world.artifact("packed_shards", "recipe", out, inputs={"tokenized_rows": rows})


def checkpoints(
    world: World, rows: Artifact, model: ModelConfig, steps: dict[int, int], *, learn: bool = True
) -> Artifact:
    """trained_checkpoints after {step: passes} over the training split; random adapters where not `learn`."""
    import pyarrow.parquet as pq
    import torch

    from sft_pipeline.training.config import TrainingConfig
    from sft_pipeline.training.model import load_for_training, save_weights

    trained, _ = load_for_training(model, TrainingConfig(seed=1), device=torch.device("cpu"))
    train = pq.read_table(rows.parts("train")[0]).to_pylist()
    width = max(r["length"] for r in train)
    ids = torch.tensor([r["input_ids"] + [0] * (width - r["length"]) for r in train])
    labels = torch.tensor([r["labels"] + [-100] * (width - r["length"]) for r in train])
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    out, passes = world.root / "out" / "trained_checkpoints", 0
    out.mkdir(parents=True)
    for step, until in steps.items():
        while passes < until and learn:
            optimizer.zero_grad()
            trained(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            passes += 1
        if not learn:
            generator = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for p in parameters:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        folder = out / f"checkpoint-{step}"
        save_weights(trained, folder, model)
        (folder / "bundle.json").write_text("{}\n")
    (out / "training.json").write_text(
        json.dumps({"model": {"precision": "fp32"}, "schedule": {"peak": 0.01}})
    )
    return world.artifact(
        "trained_checkpoints",
        "recipe",
        out,
        inputs={"tokenized_rows": rows, "packed_shards": packed(world, rows)},
        config={"model": model.model_dump(mode="json"), "training": {"learning_rate": 0.01}},
        built=Built(counts={"checkpoints": len(steps)}),
        outside={"base/model.safetensors": sha256_file(world.root / "base" / "model.safetensors")},
    )

"""Tiny models, tokenizers and packed shards made in-process, to the schema of the artifacts."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sft_pipeline.store import Artifact, Manifest
from sft_pipeline.store.files import sha256_json
from sft_pipeline.store.manifest import data_version, list_files

VOCABULARY = 96
EOS = 2
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"

PACKED = pa.schema(
    [
        ("block", pa.int32()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
        ("position_ids", pa.list_(pa.int32())),
        ("seq_lengths", pa.list_(pa.int32())),
        ("row_ids", pa.list_(pa.string())),
    ]
)


def llama(
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    *,
    tie: bool = True,
    hidden: int = 32,
    layers: int = 2,
    attention: str = "sdpa",
) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def qwen(seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    ).eval()


def tokenizer() -> Any:
    """One token per letter; ids 0-2 are special."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 32 + VOCABULARY - 3)]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": EOS} | {c: i + 3 for i, c in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def base_folder(folder: Path, *, model: Any = None) -> Path:
    """A model folder as a recipe's `model.base` names it."""
    (model or llama()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples(
    count: int, seed: int = 0, *, longest: int = 24, vocabulary: int = VOCABULARY
) -> list[dict[str, Any]]:
    """Something to learn: the answer repeats the prompt's last letters, then ends."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        prompt = [1] + [draw.randrange(3, vocabulary) for _ in range(draw.randrange(3, longest - 6))]
        answer = [*prompt[-2:], EOS]
        ids = prompt + answer
        found.append(
            {
                "row_id": f"{seed:08x}{i:024x}",
                "group": f"g{i}",
                "input_ids": ids,
                "labels": [-100] * len(prompt) + answer,
                "length": len(ids),
                "supervised": len(answer),
                "prompt_length": len(prompt),
                "completion": "".join(chr(29 + t) for t in answer[:-1]),
            }
        )
    return found


def weighed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, of every three the second at weight 0.25 and the third at 3."""
    return [
        row
        if i % 3 == 0
        else {**row, "weights": [0.0 if t == -100 else (0.25, 3.0)[i % 3 - 1] for t in row["labels"]]}
        for i, row in enumerate(rows)
    ]


def pack(rows: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """First fit; enough for tests."""
    bins: list[list[dict[str, Any]]] = []
    for row in rows:
        for b in bins:
            if sum(r["length"] for r in b) + row["length"] <= max_length:
                b.append(row)
                break
        else:
            bins.append([row])
    return [
        {
            "block": i,
            "input_ids": [t for r in b for t in r["input_ids"]],
            "labels": [t for r in b for t in r["labels"]],
            "weights": [w for r in b for w in r.get("weights", [1.0] * r["length"])]
            if any("weights" in r for r in b)
            else None,
            "position_ids": [p for r in b for p in range(r["length"])],
            "seq_lengths": [r["length"] for r in b],
            "row_ids": [r["row_id"] for r in b],
        }
        for i, b in enumerate(bins)
    ]


def plan(blocks: int, per_update: int, epochs: int, seed: int = 0) -> list[dict[str, int]]:
    rows, update = [], 1
    for epoch in range(epochs):
        order = list(range(blocks))
        random.Random(seed + epoch).shuffle(order)
        for start in range(0, blocks, per_update):
            rows += [
                {"update": update, "position": p, "block": b, "epoch": epoch}
                for p, b in enumerate(order[start : start + per_update])
            ]
            update += 1
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema, row_group: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group)


def commit(folder: Path, asset: str) -> Artifact:
    """Puts a manifest into a folder."""
    files = list_files(folder)
    manifest = Manifest(
        asset=asset,
        partition="test",
        fingerprint=sha256_json(asset),
        data_version=data_version(files),
        code_version="test",
        config={},
        inputs={},
        accepted=True,
        counts={},
        files=files,
        environment={},
        created_at="2026-01-01T00:00:00Z",
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return Artifact(folder)


def packed_shards(
    folder: Path,
    *,
    rows: int = 48,
    max_length: int = 64,
    per_update: int = 4,
    epochs: int = 2,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    poisoned: int | None = None,
    weights: bool = False,
) -> Artifact:
    """A packed_shards artifact of two parts. The first row of the block `poisoned` is nonsense, all of it
    supervised. With `weights` its rows are `weighed`.
    """
    given = weighed if weights else list
    blocks = pack(given(examples(rows, seed, vocabulary=vocabulary)), max_length)
    if poisoned is not None:
        draw, n = random.Random(seed), blocks[poisoned]["seq_lengths"][0]
        nonsense = [draw.randrange(3, VOCABULARY) for _ in range(n)]
        for name in ("input_ids", "labels"):
            blocks[poisoned][name][:n] = nonsense
    half = len(blocks) // 2
    write_parquet(folder / "train" / "part-00000.parquet", blocks[:half], PACKED)
    write_parquet(folder / "train" / "part-00001.parquet", blocks[half:], PACKED)
    write_parquet(
        folder / "validation" / "part-00000.parquet",
        pack(given(examples(12, seed + 1000)), max_length),
        PACKED,
    )
    schema = pa.schema(
        [
            (name, pa.int32())
            for name in ("update", "position", "block", "epoch", "tokens", "supervised", "examples")
        ]
    )
    planned = [
        {
            **row,
            "tokens": len(b["input_ids"]),
            "supervised": sum(t != -100 for t in b["labels"]),
            "examples": len(b["seq_lengths"]),
        }
        for row in plan(len(blocks), per_update, epochs, seed)
        for b in [blocks[row["block"]]]
    ]
    write_parquet(folder / "plan.parquet", planned, schema)
    return commit(folder, "tiny/packed_shards")


def tokenized_rows(folder: Path, *, rows: int = 48, seed: int = 0) -> Artifact:
    """A tokenized_rows artifact with the same rows."""
    schema = pa.schema(
        [
            ("row_id", pa.string()),
            ("group", pa.string()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("weights", pa.list_(pa.float32())),
            ("length", pa.int32()),
            ("supervised", pa.int32()),
            ("prompt_length", pa.int32()),
            ("completion", pa.string()),
        ]
    )
    for split, found in (
        ("train", examples(rows, seed)),
        ("validation", examples(12, seed + 1000)),
        ("test", examples(12, seed + 2000)),
    ):
        write_parquet(folder / split / "part-00000.parquet", found, schema)
    formatting = {
        "template_sha256": "t" * 64,
        "tokenizer_sha256": "k" * 64,
        "mask_sha256": "m" * 64,
        "stop_token_ids": [EOS],
        "stop_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
        "vocab_size": VOCABULARY,
    }
    (folder / "formatting.json").write_text(json.dumps(formatting))
    return commit(folder, "tiny/tokenized_rows")

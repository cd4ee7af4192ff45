"""A tiny byte-level BPE trained in-process, rows, and artifacts made of them."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sft_pipeline.store import Artifact
from sft_pipeline.tables.parquet import PartWriter
from sft_pipeline.tables.schemas import ROWS as SPLIT
from sft_pipeline.tables.schemas import content_key
from sft_pipeline.text.tokenizer import Tokenizer, make_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT = "{% for m in messages %}{{ ('<|im_start|>' if m.role == 'user' else '') + m.content + '<|im_end|>' }}{% endfor %}"
CORPUS = [
    "the key is stale so rotate the key",
    "request rotation evidence and answer the user",
    "who may read the report",
    "user assistant system tool",
] * 4
SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


@lru_cache
def _trained() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|pad|>", "<|im_start|>", "<|im_end|>")]
    )
    return backend.to_str()


def tiny_backend() -> Backend:
    return Backend.from_str(_trained())


def tiny_tokenizer(template: str | None = CHATML) -> Tokenizer:
    return make_tokenizer(
        tiny_backend(), special=dict(SPECIAL), templates={"default": template} if template else {}
    )


def save_tokenizer(folder: Path, template: str | None = CHATML, **settings: Any) -> Path:
    """A tokenizer folder as the hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_backend().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL, **settings}
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def row(
    *messages: tuple[str, str],
    row_id: str = "r",
    weights: Sequence[float | None] = (),
    tools: Any = None,
    calls: Any = None,
) -> dict[str, Any]:
    """A row of grouped_split; `calls` are the last message's tool calls."""
    given = [
        {
            "role": role,
            "content": content,
            "weight": weights[i] if i < len(weights) else None,
            "tool_calls": None,
        }
        for i, (role, content) in enumerate(messages)
    ]
    if calls:
        given[-1]["tool_calls"] = json.dumps(calls)
    given_tools = json.dumps(tools) if tools else None
    return {
        "row_id": row_id,
        "source": 0,
        "file": "rows.jsonl",
        "line": 1,
        "group": row_id,
        "messages": given,
        "tools": given_tools,
        "time": None,
        "warnings": [],
        "content_key": content_key(given, given_tools),
    }


class FakeArtifact(Artifact):
    """A folder that is read like an artifact, with a manifest that holds only a configuration and no checks."""

    @property
    def manifest(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(
            config=json.loads((self.path / "config.json").read_text())
            if (self.path / "config.json").is_file()
            else {},
            checks=[],
        )


def split_artifact(folder: Path, **sides: Sequence[dict[str, Any]]) -> Artifact:
    """A grouped_split artifact with the given rows by side."""
    for side in ("train", "validation", "test"):
        with PartWriter(folder / side, SPLIT) as out:
            out.append(list(sides.get(side, ())))
    return FakeArtifact(folder)

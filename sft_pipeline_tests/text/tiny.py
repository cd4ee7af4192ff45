"""A tiny byte-level BPE trained in-process, and tokenizer folders made of it."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from sft_pipeline.text.tokenizer import Tokenizer, make_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORT = (
    "{% for m in messages %}"
    "{{ ('<|im_start|>' if m.role == 'user' else '') + m.content + '<|im_end|>' }}{% endfor %}"
)
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

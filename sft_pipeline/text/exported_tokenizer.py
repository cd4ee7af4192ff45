"""The tokenizer's files as they are exported: what a server will load."""

import json
import shutil
from pathlib import Path
from typing import Any

from sft_pipeline.text.tokenizer import Tokenizer

GENERIC_TOKENIZER = "PreTrainedTokenizerFast"
# What would have other code, other tokens or another template loaded than those of training, or names a
# machine.
_TOKENIZER_KEYS_LEFT_OUT = (
    "chat_template",
    "added_tokens_decoder",
    "auto_map",
    "name_or_path",
    "tokenizer_file",
    "special_tokens_map_file",
)


def remedy(source: str) -> str:
    """What to do where AutoTokenizer rebuilds a tokenizer otherwise than its files say."""
    return (
        "Choose a base whose own tokenizer this is, or train with what servers make of it: "
        f"AutoTokenizer.from_pretrained({source!r}).save_pretrained('tokenizer') in Python, beside the "
        "base's config.json, and model.tokenizer: tokenizer"
    )


def write_tokenizer(
    tokenizer: Tokenizer, template: str, folder: Path, *, pad_id: int, with_tools: str | None = None
) -> None:
    """Writes tokenizer.json as training read it, tokenizer_config.json and chat_template.jinja.

    The class is the generic one: model-specific classes rebuild the tokenizer from their own idea of it
    (SmolLM2's loses its digit splitting that way), the generic one takes tokenizer.json as it is.

    Args:
        template: The Jinja source that training rendered with.
        with_tools: The source for conversations with tools, where it is another one.
        pad_id: Becomes the padding token where the tokenizer names none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tokenizer.folder / "tokenizer.json", folder / "tokenizer.json")
    path = tokenizer.folder / "tokenizer_config.json"
    own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = {k: v for k, v in own.items() if k not in _TOKENIZER_KEYS_LEFT_OUT}
    config |= {
        **tokenizer.special,
        "tokenizer_class": GENERIC_TOKENIZER,
        "clean_up_tokenization_spaces": False,
    }
    if "pad_token" not in tokenizer.special and (token := tokenizer.backend.id_to_token(pad_id)) is not None:
        config["pad_token"] = token
    write_sorted_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if with_tools is not None:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools, encoding="utf-8")


def write_sorted_json(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON that depends on the values alone."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")

"""formatting.json: what was used to format the rows."""

from typing import Any

from sft_pipeline.stages.tokenized_rows.config import TokenizedRowsConfig
from sft_pipeline.store.files import sha256_json
from sft_pipeline.text.template import FROZEN_CLOCK, ChatTemplate
from sft_pipeline.text.tokenizer import Tokenizer


def formatting_of(
    config: TokenizedRowsConfig, tokenizer: Tokenizer, template: ChatTemplate
) -> dict[str, Any]:
    """What was used to format the rows; everything that serves or evaluates the model must use the same."""
    stop_ids = tokenizer.ids(template.stop) if template.stop else []
    stop = stop_ids[0] if len(stop_ids) == 1 else None
    ends = {i for i in (stop, tokenizer.id_of("eos_token"), *tokenizer.generation_eos) if i is not None}
    mask = {**config.tokens.model_dump(mode="json"), "system": config.template.system}
    return {
        "template_sha256": template.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "mask_sha256": sha256_json(mask),
        "template_name": template.name
        if template.name == "tokenizer" or "/" not in template.name
        else "file",
        "chat_template": template.text,
        "chat_template_with_tools": template.tool_text if template.tool_text != template.text else None,
        "clock": FROZEN_CLOCK.date().isoformat() if template.uses_clock else None,
        "special_tokens": dict(tokenizer.special),
        "stop_text": template.stop,
        "stop_token_id": stop,
        "stop_token_ids": sorted(ends),
        "eos_token_id": tokenizer.id_of("eos_token"),
        "bos_token_id": tokenizer.id_of("bos_token"),
        "pad_token_id": tokenizer.id_of("pad_token"),
        "vocab_size": tokenizer.vocab_size,
        "control_tokens": dict(sorted(tokenizer.control.items(), key=lambda item: item[1])),
        "mask": mask,
    }

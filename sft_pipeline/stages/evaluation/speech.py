"""How this branch speaks: the stop ids, and text from ids, as tokenized_rows recorded them."""

import json
from typing import Any

from sft_pipeline.stages.evaluation.judge import Speech
from sft_pipeline.store import Artifact


def speech_of(tokenized: Artifact) -> Speech:
    """Reads formatting.json and loads the tokenizer that tokenized_rows used."""
    formatting: dict[str, Any] = json.loads(tokenized.file("formatting.json").read_text(encoding="utf-8"))
    raise NotImplementedError

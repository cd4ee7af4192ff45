"""The space of the comparison: templates, tokenizers that fit them, and conversations of every shape.

A template is compared with a tokenizer made for it, which has its control tokens, and with every real
tokenizer at hand that has them; the named templates and the tokenizers' own with every real tokenizer.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.text.config import NAMED_TEMPLATES

BASE = PACKAGE_DIR.parent / "data" / "base_model" / "tokenizer.json"
_TOKEN = re.compile(
    r"<\|[^|<>{}'\" ]{1,40}\|>|<｜[^｜]{1,40}｜>|</?(?:start|end)_of_\w+>|\[/?[A-Z_]{3,20}\]|</?s>"
    r"|<\|?turn\|?>|<(?:bos|eos|pad)>|<end_of_utterance>"
)
_ENDS = (
    "<|END_OF_TURN_TOKEN|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|eot|>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)


@cache
def templates() -> dict[str, str]:
    """Name -> Jinja source of the chat templates in TRL's package."""
    import importlib.util

    spec = importlib.util.find_spec("trl")  # trl itself is not imported
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    assert len(found) > 40
    return found


@dataclass(frozen=True)
class Pairing:
    """A template and a tokenizer that fits it.

    Attributes:
        template: The name of one of `templates()`, "tokenizer", or a named template of this project.
        tokenizer: The folder of a real one; None: made for the template.
    """

    template: str
    tokenizer: Path | None = None

    def __str__(self) -> str:
        return f"{self.template} on {self.tokenizer.name if self.tokenizer else 'a tokenizer made for it'}"


def pairings(tokenizers_folder: Path | None = None) -> list[Pairing]:
    """All pairs of the space; without a folder of real tokenizers, those with one that is made."""
    found = [Pairing(name) for name in templates()]
    folders = sorted(tokenizers_folder.iterdir()) if tokenizers_folder else []
    for folder in (f for f in folders if (f / "tokenizer.json").is_file()):
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = {t.content for t in backend.get_added_tokens_decoder().values()}
        fitting = [n for n, source in templates().items() if (t := _TOKEN.findall(source)) and added >= {*t}]
        found += [Pairing(name, folder) for name in ("tokenizer", *NAMED_TEMPLATES, *fitting)]
    return found


def backend_for(source: str) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """(a tokenizer that has the control tokens of a template, its special tokens by name)."""
    tokens = sorted(set(_TOKEN.findall(source)))
    special = {"bos_token": "<bos>", "eos_token": next((e for e in _ENDS if e in tokens), "<|endoftext|>")}
    backend = tokenizers.Tokenizer.from_file(str(BASE))
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in [*tokens, *special.values()]]
    )
    return backend, special


def _text(chance: random.Random) -> str:
    words = [
        "may",
        "read",
        "the key",
        "42",
        "1.50",
        "é",
        "中文",
        "😀",
        "a\nb",
        "x  y",
        "it's",
        "{}",
        "<tag>",
        "user",
    ]
    return " ".join(chance.choice(words) for _ in range(chance.randint(1, 6)))


def _tools(chance: random.Random) -> list[dict[str, Any]]:
    parameters = {
        "type": "object",
        "properties": {
            "when": {"type": "string", "description": _text(chance)},
            "guests": {"type": "integer"},
        },
        "required": ["when"],
    }
    function = {"name": "book_table", "description": "Books a table.", "parameters": parameters}
    return [{"type": "function", "function": function}]


def _call(chance: random.Random, number: int = 0) -> dict[str, Any]:
    arguments = {"when": _text(chance), "guests": chance.randint(1, 9), "late": True}
    return {
        "id": f"call{number:05d}",
        "type": "function",
        "function": {"name": "book_table", "arguments": arguments},
    }


def rows(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(shape, a source row in the format `messages`), one of each shape."""
    chance = random.Random(seed)

    def user() -> dict[str, Any]:
        return {"role": "user", "content": _text(chance)}

    def assistant(**others: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": _text(chance), **others}

    def result(number: int = 0) -> dict[str, Any]:
        names = {"name": "book_table", "tool_call_id": f"call{number:05d}"}
        return {"role": "tool", "content": _text(chance), **names}

    system = {"role": "system", "content": _text(chance)}
    call = {"role": "assistant", "content": "", "tool_calls": [_call(chance)]}
    both = {"role": "assistant", "content": "", "tool_calls": [_call(chance, 0), _call(chance, 1)]}
    tools = _tools(chance)
    yield "single turn", {"messages": [user(), assistant()]}
    yield "multi-turn", {"messages": [user(), assistant(), user(), assistant(), user(), assistant()]}
    yield "system", {"messages": [system, user(), assistant()]}
    yield "empty system", {"messages": [{"role": "system", "content": ""}, user(), assistant()]}
    yield "tools declared", {"messages": [user(), assistant()], "tools": tools}
    yield "call", {"messages": [user(), call], "tools": tools}
    yield "call with text", {"messages": [user(), assistant(tool_calls=[_call(chance)])], "tools": tools}
    yield "result", {"messages": [user(), call, result(), assistant()], "tools": tools}
    quoted = {**result(), "content": '{"temp": 20, "said": "so"}'}
    yield "result as JSON", {"messages": [user(), call, quoted, assistant()], "tools": tools}
    yield "parallel calls", {"messages": [user(), both, result(0), result(1), assistant()], "tools": tools}
    yield "reasoning", {"messages": [user(), assistant(reasoning_content=_text(chance))]}
    thought = assistant(reasoning_content=_text(chance))
    yield "reasoning in history", {"messages": [user(), thought, user(), assistant()]}
    yield (
        "reasoning alone",
        {"messages": [user(), {"role": "assistant", "content": "", "reasoning_content": "Hm."}]},
    )
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    yield "content parts", {"messages": [{"role": "user", "content": parts}, assistant()]}
    edges = [f"{a}{_text(chance)}{b}" for a, b in ((" ", ""), ("\n", " "), ("", "\n\n"), ("\t", " "))]
    turns = [{"role": ("user", "assistant")[i % 2], "content": edge} for i, edge in enumerate(edges)]
    yield "white space at the ends", {"messages": turns}

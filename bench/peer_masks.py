"""What axolotl and LLaMA-Factory train on, made by their own code; run by the Python that has one of them.

    PYTHON bench/peer_masks.py axolotl|llamafactory < requests.json > replies.json

A request is {"template": name in TRL's package, "tokenizer": folder, "rows": [...]}; the reply to each row is
[input ids, labels], or why it is refused. Both need other versions of transformers than this project, hence
their own environments: `pip install` of the package without its dependencies, and of torch, transformers,
trl, peft, datasets and accelerate at the versions that it pins.
"""

import json
import sys
import types
from collections.abc import Iterator
from typing import Any

# Templates in TRL's package and what LLaMA-Factory, which renders by formats of its own, calls them.
LLAMAFACTORY = {
    "cohere": "cohere",
    "deepseek_r1_distill": "deepseekr1",
    "deepseekv3": "deepseek3",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "glm4moe": "glm4_moe",
    "llama3": "llama3",
    "qwen2_5": "qwen",
    "qwen3": "qwen3",
    "qwen3_instruct_2507": "qwen3_nothink",
}


def axolotl(request: dict[str, Any]) -> Iterator[Any]:
    """By its chat_template strategy with its defaults: all assistant turns with what ends them."""
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    prompter = ChatTemplatePrompter(
        tokenizer,
        chat_template=tokenizer.chat_template,
        max_length=100_000,
        message_property_mappings={"role": "role", "content": "content"},
    )
    strategy = ChatTemplateStrategy(prompter, tokenizer, False, 100_000, ["assistant"], "turn")
    for row in request["rows"]:
        try:
            found = strategy.tokenize_prompt(row)
            yield [list(found["input_ids"]), list(found["labels"])]
        except Exception as error:
            yield _why(error)


def llamafactory(request: dict[str, Any]) -> Iterator[Any]:
    """By its OpenAI converter and its supervised processor, under its own template of that model."""
    import datasets  # noqa: F401  # these look for torchaudio, which only audio needs
    import peft  # noqa: F401
    import transformers
    import trl  # noqa: F401

    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    from llamafactory.data.converter import OpenAIDatasetConverter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    tokenizer = transformers.AutoTokenizer.from_pretrained(request["tokenizer"])
    arguments = DataArguments(template=LLAMAFACTORY[request["template"]], cutoff_len=100_000)
    template = get_template_and_fix_tokenizer(tokenizer, arguments)
    processor = SupervisedDatasetProcessor(template, tokenizer, None, arguments)
    layout = DatasetAttr("file", "rows", formatting="openai", messages="messages", tools="tools")
    for tag, value in (("role", "role"), ("content", "content"), ("user", "user"), ("system", "system")):
        setattr(layout, f"{tag}_tag", value)
    layout.assistant_tag, layout.observation_tag, layout.function_tag = "assistant", "tool", "function"
    converter = OpenAIDatasetConverter(layout, arguments)
    for row in request["rows"]:
        try:
            given = converter(row)
            parts = [given[f"_{name}"] for name in ("prompt", "response", "system", "tools")]
            if not parts[1]:
                raise ValueError("its converter finds no reply")
            yield list(map(list, processor._encode_data_example(*parts, [], [], [])))
        except Exception as error:
            yield _why(error)


def _why(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:60]


def main() -> None:
    """Answers the requests on standard input."""
    peer = {"axolotl": axolotl, "llamafactory": llamafactory}[sys.argv[1]]
    out, sys.stdout = sys.stdout, sys.stderr
    json.dump([list(peer(request)) for request in json.load(sys.stdin)], out)


if __name__ == "__main__":
    main()

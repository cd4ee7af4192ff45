"""What transformers' AutoTokenizer, which most servers load, makes of texts and conversations.

It runs in a process of its own, which ends with its reply and in which torch is blocked: transformers imports
torch wherever it finds it (3.5 CPU seconds instead of 1.0), and a tokenizer has no use for it. Where
transformers has been imported already, this process does the work itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sft_pipeline.project import PACKAGE_DIR


@dataclass(frozen=True)
class AutoTokenizerReply:
    """What AutoTokenizer makes of texts and conversations, or why it cannot.

    Attributes:
        ids: Token ids of each text.
        prompts: Text of each prompt.
        unavailable: Why the tokenizer could not be loaded or used.
    """

    ids: Sequence[Sequence[int]] = ()
    prompts: Sequence[str] = ()
    unavailable: str | None = None


def ask_auto_tokenizer(
    folder: str, texts: Sequence[str], prompts: Sequence[Mapping[str, Any]]
) -> AutoTokenizerReply:
    """Loads a tokenizer as a server does, and waits for its results; never raises what transformers raises.

    Args:
        folder: The tokenizer's folder.
        texts: To be encoded as they are, without special tokens.
        prompts: Keyword arguments of `apply_chat_template`, whose text is wanted.
    """
    if "transformers" in sys.modules:
        return _apply(folder, texts, prompts)
    paths = [str(PACKAGE_DIR.parent), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([folder, texts, prompts]).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        why = f"the process that loads it ended with exit status {done.returncode}"
        return AutoTokenizerReply(unavailable=why)
    return AutoTokenizerReply(**json.loads(done.stdout))


def _apply(folder: str, texts: Sequence[str], prompts: Sequence[Mapping[str, Any]]) -> AutoTokenizerReply:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        rendered = [str(tokenizer.apply_chat_template(**p, tokenize=False)) for p in prompts]
    except Exception as error:  # whatever the library raises, it raises in a server too
        first = (str(error) or "no message").splitlines()[0][:300]
        return AutoTokenizerReply(unavailable=f"{type(error).__name__}: {first}")
    return AutoTokenizerReply(ids, rendered)


def main() -> None:
    # None blocks the import, and find_spec, by which transformers decides, finds no such package.
    sys.modules["torch"] = None  # type: ignore[assignment]
    json.dump(asdict(_apply(*json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()

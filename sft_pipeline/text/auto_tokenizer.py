"""What transformers' AutoTokenizer, which most servers load, makes of texts and conversations.

It runs in a process of its own, which ends with its reply and in which torch is blocked: transformers imports
torch wherever it finds it (3.5 CPU seconds instead of 1.0), and a tokenizer has no use for it. Where
transformers has been imported already, this process does the work itself.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.text.template import FROZEN_CLOCK


@dataclass(frozen=True)
class AutoTokenizerRequest:
    """What AutoTokenizer is asked.

    Attributes:
        folder: The tokenizer's folder.
        texts: To be encoded as they are, without special tokens.
        prompts: Keyword arguments of `apply_chat_template`.
    """

    folder: str
    texts: Sequence[str] = ()
    prompts: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class AutoTokenizerReply:
    """What AutoTokenizer makes of texts and conversations, or why it cannot.

    Attributes:
        ids: Token ids of each text.
        prompts: Text of each prompt; None where the template refuses it.
        prompt_ids: Token ids of each prompt.
        unavailable: Why the tokenizer could not be loaded or used.
    """

    ids: Sequence[Sequence[int]] = ()
    prompts: Sequence[str | None] = ()
    prompt_ids: Sequence[Sequence[int]] = ()
    unavailable: str | None = None


def ask_auto_tokenizer(requests: Sequence[AutoTokenizerRequest]) -> list[AutoTokenizerReply]:
    """Loads tokenizers as a server does, and waits for the results; never raises what transformers raises.

    The clock that templates may read stands still, as in training.
    """
    if "transformers" in sys.modules:
        return list(map(_apply, requests))
    paths = [str(PACKAGE_DIR.parent), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(list(map(asdict, requests))).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    if done.returncode:
        why = f"the process that loads it ended with exit status {done.returncode}"
        return [AutoTokenizerReply(unavailable=why) for _ in requests]
    return [AutoTokenizerReply(**reply) for reply in json.loads(done.stdout)]


@contextmanager
def frozen_clock() -> Iterator[None]:
    """`strftime_now` in chat templates gives the time of training, FROZEN_CLOCK.

    A template is given no function as a variable (transformers makes text of it), so the clock that
    transformers itself reads is replaced.
    """
    from transformers.utils import chat_template_utils

    class FrozenDatetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return FROZEN_CLOCK

    module: Any = chat_template_utils
    own, module.datetime = module.datetime, FrozenDatetime
    try:
        yield
    finally:
        module.datetime = own


def _apply(request: AutoTokenizerRequest) -> AutoTokenizerReply:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(request.folder, local_files_only=True)

        def encoded(texts: Sequence[str]) -> Sequence[Sequence[int]]:
            return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

        ids = encoded(request.texts)
        with frozen_clock():
            prompts = [_prompt(tokenizer, prompt) for prompt in request.prompts]
        prompt_ids = encoded([prompt or "" for prompt in prompts])
    except Exception as error:  # whatever the library raises, it raises in a server too
        first = (str(error) or "no message").splitlines()[0][:300]
        return AutoTokenizerReply(unavailable=f"{type(error).__name__}: {first}")
    return AutoTokenizerReply(ids, prompts, prompt_ids)


def _prompt(tokenizer: Any, arguments: Mapping[str, Any]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(**arguments, tokenize=False))
    except Exception:  # whatever a template's own expressions raise
        return None


def main() -> None:
    # None blocks the import, and find_spec, by which transformers decides, finds no such package.
    sys.modules["torch"] = None  # type: ignore[assignment]
    requests = [AutoTokenizerRequest(**request) for request in json.load(sys.stdin)]
    json.dump([asdict(_apply(request)) for request in requests], sys.stdout)


if __name__ == "__main__":
    main()

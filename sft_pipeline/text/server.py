"""What transformers' AutoTokenizer, which most servers load, makes of texts and conversations.

It runs in a process of its own, which ends with its reply and in which torch is blocked: transformers imports
torch wherever it finds it (3.5 CPU seconds instead of 1.0), and a tokenizer has no use for it. Where
transformers has been imported already, this process does the work itself.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from sft_pipeline.project import PACKAGE_DIR


@dataclass(frozen=True)
class ServerRequest:
    """What a server is to encode and to render.

    Attributes:
        folder: The tokenizer's folder.
        texts: To be encoded as they are, without special tokens.
        prompts: Keyword arguments of `apply_chat_template`, whose text is wanted.
    """

    folder: str
    texts: Sequence[str]
    prompts: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ServerReply:
    """What a server makes of a request, or why it cannot.

    Attributes:
        ids: Token ids of each text.
        prompts: Text of each prompt.
        unavailable: Why the tokenizer could not be loaded or used.
    """

    ids: Sequence[Sequence[int]] = ()
    prompts: Sequence[str] = ()
    unavailable: str | None = None


class Server:
    """Works on one request in the background. Leaving the context ends its process, whatever it is doing."""

    def __init__(self, request: ServerRequest) -> None:
        self._request, self._process = request, None
        if "transformers" not in sys.modules:
            # Files, not pipes: a pipe fills up, and would have to be read while others work.
            self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the context
            paths = [str(PACKAGE_DIR.parent), os.environ.get("PYTHONPATH")]
            with tempfile.TemporaryFile() as stdin:
                stdin.write(json.dumps(asdict(request)).encode())
                stdin.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__],
                    stdin=stdin,
                    stdout=self._output,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                )

    def reply(self) -> ServerReply:
        """Waits for the reply."""
        if self._process is None:
            return serve(self._request)
        code = self._process.wait()
        self._output.seek(0)
        if code:
            return ServerReply(unavailable=f"the process that loads it ended with exit status {code}")
        return ServerReply(**json.loads(self._output.read()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._output.close()


def serve(request: ServerRequest) -> ServerReply:
    """Loads the tokenizer as a server does and works on the request. Imports transformers."""
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(request.folder, local_files_only=True)
        texts = list(request.texts)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        prompts = [str(tokenizer.apply_chat_template(**p, tokenize=False)) for p in request.prompts]
    except Exception as error:  # whatever the library raises, it raises in a server too
        first = (str(error) or "no message").splitlines()[0][:300]
        return ServerReply(unavailable=f"{type(error).__name__}: {first}")
    return ServerReply(ids, prompts)


def main() -> None:
    # None blocks the import, and find_spec, by which transformers decides, finds no such package.
    sys.modules["torch"] = None  # type: ignore[assignment]
    reply = serve(ServerRequest(**json.load(sys.stdin)))
    json.dump(asdict(reply), sys.stdout)


if __name__ == "__main__":
    main()

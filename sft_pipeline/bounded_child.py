"""The process that does what may never end: regular expressions, JSON Schemas and templates of a user.

It reads one line of JSON that says what to do, then one line with a list of texts at a time, and answers each
with a line of results, or with a text that says what went wrong. It sets itself a limit of processor time for
each text, and one of memory. The kernel ends it where it takes more time, also amid a match, which
Python itself cannot stop.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MOST_BYTES = 4 * 2**30
OUT_OF_MEMORY = 3  # an exit code


def search(pattern: str, group: int) -> Callable[[str], str | None]:
    """What the group of the first match holds; None where there is none."""
    compiled = re.compile(pattern)
    return lambda text: match.group(group) if (match := compiled.search(text)) else None


def full_match(pattern: str) -> Callable[[str], bool]:
    """Whether the pattern matches the whole text."""
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text) is not None


def valid_json(schema: Any) -> Callable[[str], bool]:
    """Whether a schema that `json_schemas.check_schema` lets pass accepts a JSON text."""
    from sft_pipeline.json_schemas import validator

    is_valid = validator(schema).is_valid

    def accepts(text: str) -> bool:
        try:
            return bool(is_valid(json.loads(text)))
        except (RecursionError, ArithmeticError):  # a value nested too deeply to be checked, or 1e999
            return False

    return accepts


def rendered_length(text: str, tool_text: str, special: Any) -> Callable[[str], int]:
    """The length of what a chat template makes of a conversation (JSON); 0 where it refuses it."""
    from sft_pipeline.text.template import ChatTemplate

    template = ChatTemplate("", text, tool_text, special)

    def length(conversation: str) -> int:
        given = json.loads(conversation)
        try:
            return len(template.render(given["messages"], given["tools"]))
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error.__cause__, MemoryError):
                raise error.__cause__ from None
            return 0  # what it refuses it says where it is used

    return length


TASKS: dict[str, Callable[..., Callable[[str], Any]]] = {
    function.__name__: function for function in (search, full_match, valid_json, rendered_length)
}


def main() -> None:
    """Serves one task until stdin ends."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    task = json.loads(sys.stdin.buffer.readline())
    function = TASKS[task["name"]](*task["arguments"])

    def limited(text: str) -> Any:
        # SIGPROF is not handled, so that it ends the process.
        signal.setitimer(signal.ITIMER_PROF, task["seconds"])
        try:
            return function(text)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    for line in sys.stdin.buffer:
        try:
            answer: Any = list(map(limited, json.loads(line)))
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

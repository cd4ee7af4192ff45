"""The process that does what might never end: regular expressions, JSON Schemas and templates of a user.

It reads one line of JSON that names a function and its arguments; that function makes the one that is called.
Then it reads one line with a list of texts at a time, and answers each with a line: a list of results, or a
text that says what went wrong (an object, where it could not even begin). It sets itself a limit of processor
time for each text, and one of memory. The kernel ends it where it takes more time, also amid a match, which
Python itself cannot stop.
"""

import importlib
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


def main() -> None:
    """Serves one task until stdin ends."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    task = json.loads(sys.stdin.buffer.readline())
    try:
        make = getattr(importlib.import_module(task["module"]), task["function"])
        function: Callable[[str], Any] = make(*task["arguments"])
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
    except Exception as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)

    def limited(text: str) -> Any:
        # SIGPROF is not handled, so that it ends the process.
        signal.setitimer(signal.ITIMER_PROF, task["seconds"])
        try:
            return function(text)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    for line in sys.stdin.buffer:
        try:
            results = list(map(limited, json.loads(line)))
        except MemoryError:
            sys.exit(OUT_OF_MEMORY)
        except Exception as error:
            _answer(f"{type(error).__name__}: {error}")
        else:
            _answer(results)


def _answer(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""What a user wrote and what might never end: it is done within bounds, or an error says which were passed.

Regular expressions stay those of `re`, done in a process of their own. The package `regex`, whose matches can
be timed out, reads some of them in another way: `\\w`, `\\s`, `{e}`, `[[:alpha:]]`.
"""

import json
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sft_pipeline import bounded_child
from sft_pipeline.errors import InputError

SECONDS = 5.0  # of processor time, for one text; an ordinary pattern takes a millionth of it


class OutOfBounds(Exception):
    """Something did not end within its bounds, or failed; the message says how."""


class BoundedTask:
    """A function, called with texts in a process of its own. The first call starts it.

    Args:
        make: Makes the function of the arguments, there. It stands at the top of a module of this package.
        arguments: JSON values.
    """

    def __init__(self, make: Callable[..., Callable[[str], Any]], *arguments: Any) -> None:
        self._task = {
            "module": make.__module__,
            "function": make.__name__,
            "arguments": arguments,
            "seconds": SECONDS,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, texts: Sequence[str]) -> list[Any]:
        """One result for each text.

        Raises:
            OutOfBounds: A text took too much time or memory, or the function failed on it.
            InputError: The process itself failed, not what it was given.
        """
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(list(texts)).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        failed = f"the process for {self._task['function']} failed before it did anything"
        if answer:
            found = json.loads(answer)
            if isinstance(found, str):
                raise OutOfBounds(f"failed with {found}")
            if isinstance(found, dict):
                raise InputError(f"{failed}: {found['error']}")
            return list(found)
        self._process = None  # the next call starts another
        code = process.wait()
        if code == -signal.SIGPROF:
            raise OutOfBounds(f"did not finish within {SECONDS:g} s")
        if code == bounded_child.OUT_OF_MEMORY:
            raise OutOfBounds(f"did not finish within {bounded_child.MOST_BYTES / 2**30:g} GiB of memory")
        if code < 0:  # by the kernel, where the machine's memory is full or the stack is too deep
            raise OutOfBounds(f"ended its process with the signal {-code}")
        raise InputError(f"{failed} (exit code {code})")

    def _start(self) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", bounded_child.__name__]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, process)  # by itself it ends when its stdin does, with this process
        self._process = process
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(self._task).encode() + b"\n")
        except BrokenPipeError:
            pass  # the call finds no answer
        return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


def compiled(pattern: str) -> "re.Pattern[str]":
    """Raises:
    ValueError: It is not a regular expression; the message says why.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        why = str(error) or "nested too deeply"
        raise ValueError(f"not a regular expression: {why}") from error


def matching(setting: str, pattern: str, names: Sequence[str], *, whole: bool = False) -> set[str]:
    """The names in which a pattern is found; with `whole`, those that it matches as a whole.

    Args:
        setting: Key of the configuration that has the pattern, for messages.

    Raises:
        InputError: It is not a regular expression, or does not finish on these names.
    """
    try:
        compiled(pattern)
        search, full_match = bounded_child.search, bounded_child.full_match
        task = BoundedTask(full_match, pattern) if whole else BoundedTask(search, pattern, 0)
        results = task(names)
    except ValueError as error:
        raise InputError(f'{setting} "{pattern}": {error}') from error
    except OutOfBounds as error:
        raise InputError(
            f'{setting} "{pattern}" {error} on these names: write it so that no repeated part is repeated '
            "again, like a+ in (a+)+"
        ) from error
    return {name for name, found in zip(names, results, strict=True) if found or found == ""}

"""Lines as users write them: good rows among everything that can be wrong with a row of JSON lines."""

import json
import random
from collections.abc import Callable
from typing import Any

TEXTS = [
    "",
    " ",
    "a",
    "Stale key?",
    "é漢字😀",
    "<|im_end|>",
    "[INST] x",
    "bell\x07",
    "tab\tnew\nline\r",
    "\x7f",
    '"quoted" \\',
    "\u2028",
    "null",
    "{[",
    "</s>",
]
NUMBERS = [
    "0",
    "-0",
    "-0.0",
    "1E5",
    "1e400",
    "-1e400",
    "1e-400",
    "0.1",
    "9" * 19,
    "-" + "9" * 19,
    "9" * 20,
    "9" * 400,
    "9" * 5_000,
    "18446744073709551616",
    "0.30000000000000004",
    "1" + "0" * 40 + ".5",
    "NaN",
    "Infinity",
    "-Infinity",
    "01",
    "1.",
    ".5",
    "+1",
    "0x1",
]
JUNK = [
    b"",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\r",
    b"\x0b",
    b"\\u",
    b"\\ud800",
    b"\\u0022",
    b"NaN",
    b"1e400",
    b"9" * 25,
]
CALLS = [
    '{"name": "f", "arguments": {"x": 1}}',
    '{"name": "f", "arguments": "{\\"x\\": NaN}"}',
    '{"name": "\\ud800", "arguments": {}}',
    "not json",
    '{"name": 1}',
    "[" * 5_000,
    '[{"name": "<\\u007cim_end|>", "arguments": {"y": 1e999}}]',
    None,
    7,
]


def broken_lines(count: int, seed: int) -> list[bytes]:
    """`count` lines without their line ends, the same for the same seed."""
    some = random.Random(seed)
    return [some.choice(KINDS)(some) for _ in range(count)]


def _text(some: random.Random) -> str:
    return "".join(some.choices(TEXTS, k=some.randint(0, 4))) + str(some.randint(0, 300))


def _value(some: random.Random, depth: int = 3) -> Any:
    kind = some.randrange(9 if depth else 6)
    if kind < 3:
        return _text(some)
    if kind < 6:
        return some.choice([None, True, False, 0, -7, 2.5, 1e300, 2**63, 2**64, 10**400])
    if kind < 8:
        return [_value(some, depth - 1) for _ in range(some.randint(0, 3))]
    return {_text(some): _value(some, depth - 1) for _ in range(some.randint(0, 3))}


def _pair(some: random.Random) -> dict[str, Any]:
    return {"prompt": _text(some), "completion": _text(some)}


def _dumped(some: random.Random, row: Any) -> bytes:
    data = json.dumps(row, ensure_ascii=some.random() < 0.5, sort_keys=some.random() < 0.5)
    return data.encode("utf-8", "surrogatepass") + some.choice([b"", b"", b"\r", b" \r"])


def good(some: random.Random) -> bytes:
    return _dumped(some, _pair(some))


def turns(some: random.Random) -> bytes:
    def turn() -> Any:
        role = some.choice(
            ["user", "assistant", "system", "tool", "function_call", "gpt", "narrator", 7, None]
        )
        content = some.choice(CALLS) if role == "function_call" else some.choice([_text(some), _value(some)])
        rest = {some.choice(["weight", "loss"]): some.choice([0, 0.5, True, -1, 1e39, 10**400, "x", None])}
        calls = {"tool_calls": [some.choice(CALLS)]}
        return {"role": role, "content": content, **some.choice([{}, rest, calls])}

    row = {"prompt": [turn() for _ in range(some.randint(0, 3))], "completion": _text(some)}
    return _dumped(
        some, {**row, **some.choice([{}, {"tools": some.choice(CALLS)}, {"system": _value(some)}])}
    )


def wrong_types(some: random.Random) -> bytes:
    return _dumped(
        some,
        some.choice([_value(some), {**_pair(some), some.choice(["prompt", "completion"]): _value(some)}]),
    )


def surrogates(some: random.Random) -> bytes:
    broken = {**_pair(some), "prompt": _text(some) + some.choice(["\ud83d", "\udc00x"])}
    return _dumped(some, some.choice([broken, {"\ud800": 1}]))


def numbers(some: random.Random) -> bytes:
    row = _dumped(some, {**_pair(some), "id": "HERE"})
    return row.replace(b'"HERE"', some.choice(NUMBERS).encode())


def twice(some: random.Random) -> bytes:
    key = some.choice(["prompt", "completion", "\\u0070rompt", "other"])
    value = some.choice(["x", "\\u0022"])
    return f'{{"{key}": "{value}", '.encode() + _dumped(some, _pair(some))[1:]


def deep(some: random.Random) -> bytes:
    levels, (start, end) = some.choice([50, 99, 100, 300, 2_000]), some.choice([("[", "]"), ('{"a":', "}")])
    return f'{{"prompt": "p", "completion": "c", "x": {start * levels}1{end * levels}}}'.encode()


def mutated(some: random.Random) -> bytes:
    data = some.choice([good, turns, numbers])(some)
    at = some.randrange(len(data))
    return (data[:at] + some.choice(JUNK) + data[at + some.randint(0, 2) :]).replace(b"\n", b"")


def cut(some: random.Random) -> bytes:
    data = good(some)
    return data[: some.randrange(len(data))]


def junk(some: random.Random) -> bytes:
    return b"".join(some.choices(JUNK, k=some.randint(0, 5)))


def huge(some: random.Random) -> bytes:
    if some.random() < 0.9:
        return good(some)
    text = some.choice(["x", "é\n", "<|im_end|>", "[", '"'])
    return _dumped(
        some, {**_pair(some), some.choice(["prompt", "note"]): text * some.randint(10_000, 80_000)}
    )


KINDS: list[Callable[[random.Random], bytes]] = [
    good,
    good,
    good,
    turns,
    wrong_types,
    surrogates,
    numbers,
    twice,
    deep,
    mutated,
    cut,
    junk,
    huge,
]

"""Rows that look like the public data sets in size and shape, made from a seed.

Words follow Zipf's law over some 35,000 forms: common English words first, then stems with prefixes and
endings. With a vocabulary trained on real text such a word takes about as many tokens as a word of a real
answer.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

Pair = tuple[str, str]
Pairs = Iterator[Pair]
SEED = 20
CHUNK = 5_000  # rows drawn at a time

COMMON, STEMS, NAMES = (
    part.split() for part in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split("\n\n")
)
PREFIXES = ("", "re", "un", "over", "out", "under")
ENDINGS = ("", "s", "ed", "ing", "er", "ers", "able", "ly", "ness", "ment", "ful", "less", "ive")
EXOTIC = (
    "“{}”",
    "{} – café, naïve, Zoë",
    "{} 🙂",
    "‘{}’…",
    "{} (São Paulo, Kraków)",
    "{} 🚀 déjà vu",
    "{} 東京",
)
EXOTIC_SHARE = 0.04


class Prose:
    """Draws English-looking text: Zipf words, numbers, commas, sentences that begin with a capital."""

    def __init__(self, rng: np.random.Generator) -> None:
        forms = (p + s + e for p in PREFIXES for e in ENDINGS for s in STEMS)
        words = list(dict.fromkeys([*COMMON, *forms]))
        numbers = [str(n) for n in (*range(2, 100), *range(100, 3_000, 7), *range(1900, 2030))]
        self.words = words
        plain = np.array([*words, *numbers], dtype=object)
        capital = np.array([w.capitalize() for w in plain], dtype=object)
        zipf = 1 / np.arange(3, len(words) + 3) ** 1.15
        weights = np.concatenate([0.96 * zipf / zipf.sum(), np.full(len(numbers), 0.04 / len(numbers))])
        self._cumulative = np.cumsum(weights)
        # six spellings of every word: (plain, with a comma, with a full stop) x (small, capital)
        self._spellings = np.stack([v + mark for v in (plain, capital) for mark in ("", ",", ".")])
        self._rng = rng

    def texts(self, lengths: npt.NDArray[np.int64]) -> Iterator[str]:
        """One text for each length in words."""
        total = int(lengths.sum())
        ends = np.cumsum(lengths)
        word = np.minimum(
            np.searchsorted(self._cumulative, self._rng.random(total)), len(self._cumulative) - 1
        )
        mark = np.searchsorted([0.86, 0.93], self._rng.random(total))  # 7 % commas, 7 % full stops
        mark[ends - 1] = 2
        capital = np.concatenate([[True], mark[:-1] == 2])
        spelled = self._spellings[mark + 3 * capital, word]
        exotic = np.where(
            self._rng.random(len(lengths)) < EXOTIC_SHARE,
            self._rng.integers(len(EXOTIC), size=len(lengths)),
            -1,
        )
        start = 0
        for end, frame in zip(ends.tolist(), exotic.tolist(), strict=True):
            text = " ".join(spelled[start:end].tolist())
            yield text if frame < 0 else EXOTIC[frame].format(text)
            start = end


def _lognormal(rng: np.random.Generator, mean: float, spread: float, count: int) -> npt.NDArray[np.int64]:
    """Lengths in words with this mean; at least three words."""
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.maximum(drawn, 3).astype(np.int64)


def _prose_pairs(seed: int, prompt: tuple[float, float], completion: tuple[float, float]) -> Pairs:
    """Endless prompts and completions; each length is (mean, spread of its logarithm) in words."""
    rng = np.random.default_rng(seed)
    prose = Prose(rng)
    while True:
        yield from zip(
            prose.texts(_lognormal(rng, *prompt, CHUNK)),
            prose.texts(_lognormal(rng, *completion, CHUNK)),
            strict=True,
        )


def alpaca_like(seed: int) -> Pairs:
    """Short instructions, answers of a paragraph."""
    return _prose_pairs(seed, (18, 0.5), (48, 0.8))


def sixty_words(seed: int) -> Pairs:
    """About 60 words per row."""
    return _prose_pairs(seed, (20, 0.4), (40, 0.4))


def dolly_like(seed: int) -> Pairs:
    """Instructions, three in ten with a long context whose length has a heavy tail."""
    rng = np.random.default_rng(seed)
    prose = Prose(rng)
    while True:
        context = np.where(rng.random(CHUNK) < 0.3, _lognormal(rng, 200, 0.9, CHUNK), 0)
        asked = prose.texts(np.minimum(_lognormal(rng, 12, 0.5, CHUNK) + context, 3_000))
        yield from zip(asked, prose.texts(_lognormal(rng, 52, 0.9, CHUNK)), strict=True)


def gsm8k_like(seed: int) -> Pairs:
    """Word problems with worked answers; names, things, numbers, order vary: no row nearly repeats one."""
    rng = np.random.default_rng(seed)
    things = Prose(rng).words[len(COMMON) :]
    while True:
        yield _problem(rng, things)


def _problem(rng: np.random.Generator, things: list[str]) -> Pair:
    who = [NAMES[i] for i in rng.choice(len(NAMES), 3, replace=False)]
    what = [things[int(i)] for i in len(things) * rng.random(5) ** 3]
    n, m, k = (int(v) for v in rng.integers(2, 97, 3))
    price = int(rng.integers(2, 40))
    asked = [
        f"{who[0]} sold {n} {what[0]} to {who[1]} in the {what[3]} "
        f"and then {m} more {what[0]} in the week after.",
        f"Each of the {what[1]} costs ${price}, and {who[1]} needs {k} of them for the {what[4]}.",
        f"In {1900 + n} there were {k * 10} {what[2]} at the {what[4]}, and {who[2]} took {n}% of them home.",
        f"A box holds {m} {what[1]} while the {what[3]} can only carry {k} of the {what[2]}.",
        f"{who[2]} works {k} hours a day and earns ${price} per hour at the {what[3]}.",
        f"It takes {who[0]} {n} minutes to walk to the {what[4]} "
        f"and {m} minutes to come back with the {what[1]}.",
        f"{who[1]} has twice as many {what[2]} as {who[0]}, who has {k} fewer than {who[2]}.",
    ]
    order = rng.permutation(len(asked))[: int(rng.integers(2, 5))]
    question = (
        " ".join(asked[int(i)] for i in order)
        + f" How many {what[int(rng.integers(3))]} does {who[0]} have left in the end?"
    )
    total, cost, rest = n + m, price * k, (n + m) * 3 - k
    steps = [
        f"{who[0]} has {n}+{m} = <<{n}+{m}={total}>>{total} {what[0]}.",
        f"The {what[1]} cost {price}*{k} = $<<{price}*{k}={cost}>>{cost} for {who[1]}.",
        f"So {who[2]} keeps {total}*3-{k} = <<{total}*3-{k}={rest}>>{rest} "
        f"of the {what[2]} at the {what[4]}.",
        f"That leaves {cost}-{n} = <<{cost}-{n}={cost - n}>>{cost - n} "
        f"{what[int(rng.integers(3))]} in the {what[3]}.",
    ]
    worked = "\n".join(steps[int(i)] for i in rng.permutation(len(steps))[: int(rng.integers(2, 5))])
    return question, f"{worked}\n#### {rest}"


@dataclass(frozen=True)
class DataSet:
    """A data set of the benchmark: `rows` as in the public one it stands for."""

    name: str
    rows: int
    make: Callable[[int], Pairs]


DATA_SETS = {
    d.name: d
    for d in (
        DataSet("gsm8k", 7_473, gsm8k_like),
        DataSet("alpaca", 52_002, alpaca_like),
        DataSet("dolly", 15_011, dolly_like),
        DataSet("gsm8k_like", 60_000, gsm8k_like),
        DataSet("million", 1_000_000, sixty_words),
    )
}


def synthetic(name: str, rows: int) -> Pairs:
    """That many rows of a data set."""
    return islice(DATA_SETS[name].make(SEED), rows)


def question_answer(path: Path) -> Pairs:
    """The rows of a JSON Lines file with question and answer (or of the folder's train.jsonl)."""
    path = path / "train.jsonl" if path.is_dir() else path
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            yield row["question"], row["answer"]


def edited(rows: Pairs, every: int) -> Pairs:
    """The rows with one in `every` changed."""
    for i, (prompt, completion) in enumerate(rows):
        yield prompt, f"{completion} Edited in revision {i}." if i % every == 0 else completion


def write(rows: Pairs, folder: Path, *, messages: bool = True) -> int:
    """Writes rows as JSON Lines in the shapes that the systems read; returns how many.

    flat.jsonl has prompt and completion as text; messages.jsonl, which can be left out, has them as lists of
    messages, which is what makes TRL render them with the chat template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = ["flat.jsonl", *(["messages.jsonl"] if messages else [])]
    count = 0
    with ExitStack() as stack:
        flat, *lists = [stack.enter_context((folder / name).open("w", encoding="utf-8")) for name in names]
        for prompt, completion in rows:
            flat.write(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
            for stream in lists:
                row = {
                    "prompt": [{"role": "user", "content": prompt}],
                    "completion": [{"role": "assistant", "content": completion}],
                }
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count

"""Near-duplicates: the search finds exactly what comparing all with all finds, and none crosses splits."""

import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_pipeline.stages.grouped_split import near_duplicates, shingles
from sft_pipeline.stages.grouped_split import prefix_index as prefixes
from sft_pipeline.stages.grouped_split.near_duplicates import cross_split_duplicates, leaked, neighbours
from sft_pipeline.stages.grouped_split.prefix_index import prefix_index
from sft_pipeline.stages.grouped_split.shingles import ShingleSets, jaccard, shingle_sets, texts_of
from sft_pipeline.stages.grouped_split.split import TEST, TRAIN, VALIDATION
from sft_pipeline.tables.schemas import SPLITS
from sft_pipeline_tests.dataset_runs import check, dataset, project, rows, run, write_jsonl

__all__ = ["project"]


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    size = min(3, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def similarity(one: str, other: str) -> float:
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


def test_shingles_are_word_trigrams_without_case_and_punctuation() -> None:
    assert jaccard("The KEY is stale, really!", "the key is stale really") == 1
    assert jaccard("a b c d", "a b c e") == pytest.approx(1 / 3)
    assert jaccard("ok", "ok.") == 1 and jaccard("ok", "no") == 0 and jaccard("a b", "b a") == 0
    assert jaccard("?!", "?!") == 1 and jaccard("?!", "!!") == 0 and jaccard("", "") == 1
    assert jaccard("東京都の天気は", "東京都の天気が") > 0.5
    sizes, hashes = shingle_sets(pa.array(["one two three four", "x", "", "one two three one two three"]))
    assert sizes.tolist() == [2, 1, 1, 3] and len(hashes) == 7


LETTERS = "aAbZ09_-.,!? \t\n\x00'\"éÉßñŁ€—“”…ŸÿΩωДжע१ำกข東京カひ한글ſKİ\u0301\U0001f600"
UNSPACED = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI")


def reference_words(text: str) -> list[str]:
    """Letter by letter, as the module's docstring says."""
    words = [""]
    for letter in text:
        if unicodedata.name(letter, "").startswith(UNSPACED):
            words += [letter, ""]
        elif unicodedata.category(letter)[0] in "LMN":
            words[-1] += letter.lower() if len(letter.lower()) == 1 else "i"
        else:
            words.append("")
    return [w for w in words if w]


@settings(max_examples=300, deadline=None)
@given(
    texts=st.lists(
        st.one_of(
            st.text(LETTERS, max_size=30),
            st.lists(
                st.sampled_from(["one", "TWO", "a" * 8, "b" * 9, "b" * 17, "c" * 64, "d" * 65, "é" * 40]),
                max_size=12,
            ).map(" ".join),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_sets_are_the_distinct_trigrams_of_the_words_of_each_text_alone(texts: list[str]) -> None:
    sizes, hashes = shingle_sets(pa.array(texts, pa.string()))
    ends = np.cumsum(sizes)
    named: dict[int, Any] = {}
    for text, end, size in zip(texts, ends, sizes):
        words = reference_words(text)
        gram = min(3, len(words))
        expected = (
            {tuple(words[i : i + gram]) for i in range(len(words) - gram + 1)} if words else {text.strip()}
        )
        found = hashes[end - size : end].tolist()
        assert size == len(expected) and found == sorted(set(found))
        assert found == shingle_sets(pa.array([text], pa.string()))[1].tolist()
        if len(expected) == 1:  # the same shingle has the same hash wherever it is, and no other has it
            assert named.setdefault(found[0], expected) == expected or not words


def test_sets_depend_neither_on_batches_nor_on_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = corpus(3, 500) + ["“Où est l’été ?” — demanda-t-il", "東京都の天気"] * 3
    found = []
    for name, step, threads, text_at_once in (("a", 500, 1, 1 << 20), ("b", 7, 3, 100), ("c", 64, 8, 1)):
        monkeypatch.setattr(shingles, "TEXT_AT_ONCE", text_at_once)
        batches = [pa.array(texts[i : i + step]) for i in range(0, len(texts), step)]
        sets = ShingleSets(batches, tmp_path / name, threads)
        index = prefix_index(sets, 0.7)
        found.append((sets.node.tolist(), sets.size.tolist(), index.short.tolist(), index.rest.tolist()))
    assert found[0] == found[1] == found[2]


def test_the_system_message_is_left_out() -> None:
    struct = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string())])
    rows = [[("system", "S", None), ("user", "Q", None), ("assistant", "", "[call]")], [("user", "P", None)]]
    messages = pa.array(
        [[dict(zip(("role", "content", "tool_calls"), m)) for m in row] for row in rows], pa.list_(struct)
    )
    assert [t.split() for t in texts_of(messages).to_pylist()] == [["Q", "[call]"], ["P"]]
    assert texts_of(messages.slice(1)).to_pylist()[0].split() == ["P"]


def corpus(seed: int, size: int) -> list[str]:
    """Texts around the threshold: copies with some words changed, templates, short and equal ones."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(30)]
    texts: list[str] = []
    for _ in range(size):
        kind = rng.random()
        if texts and kind < 0.6:
            text = rng.choice(texts).split()
            for _ in range(rng.randrange(3)):
                at = rng.randrange(len(text))
                text[at : at + rng.randrange(2)] = rng.choices(words, k=rng.randrange(1, 3))
        else:
            text = rng.choices(words, k=rng.choice([1, 2, 3, 4, 8, 20, 40]))
        texts.append(" ".join(text))
    return texts


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    threshold=st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9, 1.0]),
    pairs_at_once=st.sampled_from([3, 50, 1 << 20]),
    many_pairs=st.sampled_from([1, 8, 1 << 13]),
    rarest=st.sampled_from([2, 16, 128]),
    long_set=st.sampled_from([1, 20, 2_048]),
    permuted=st.booleans(),
)
def test_the_search_is_exact(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    threshold: float,
    pairs_at_once: int,
    many_pairs: int,
    rarest: int,
    long_set: int,
    permuted: bool,
) -> None:
    monkeypatch.setattr(near_duplicates, "PAIRS_AT_ONCE", pairs_at_once)
    monkeypatch.setattr(near_duplicates, "BLOCK", pairs_at_once)
    monkeypatch.setattr(near_duplicates, "MANY_PAIRS", many_pairs)
    monkeypatch.setattr(prefixes, "ROWS_AT_ONCE", 16)
    monkeypatch.setattr(prefixes, "RAREST", rarest)
    monkeypatch.setattr(shingles, "LONG_SET", long_set)
    texts = in_another_order(seed, 50, sentences=5, words=4) if permuted else corpus(seed, 50)
    sets = ShingleSets([pa.array(texts[:20]), pa.array(texts[20:])], tmp_path / "sets")
    near = np.arange(len(texts)) % 3 == 0
    nodes = sets.node == np.arange(len(texts))
    one, other, found = neighbours(sets, prefix_index(sets, threshold), near & nodes, ~near & nodes)
    for x, y, value in zip(one, other, found):
        assert value == pytest.approx(similarity(texts[x], texts[y])) and value >= threshold - 1e-9
    expected = {
        x
        for x in np.flatnonzero(~near & nodes)
        if any(similarity(texts[x], texts[y]) >= threshold for y in np.flatnonzero(near & nodes))
    }
    assert set(one.tolist()) == expected


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.4, 0.8]))
def test_rows_that_resemble_a_held_out_row_are_found_and_no_others(
    tmp_path: Path, seed: int, threshold: float
) -> None:
    texts = corpus(seed, 60)
    split = (
        np.random.default_rng(seed)
        .choice([TRAIN, TRAIN, TRAIN, VALIDATION, TEST], len(texts))
        .astype(np.int8)
    )
    sets = ShingleSets([pa.array(texts)], tmp_path / "sets")
    found = cross_split_duplicates(sets, prefix_index(sets, threshold), split)

    def resembles(x: int, others: Any) -> bool:
        return any(similarity(texts[x], texts[y]) >= threshold for y in others)

    test, validation = (np.flatnonzero(split == s) for s in (TEST, VALIDATION))
    of_test = [x for x in np.flatnonzero(split != TEST) if resembles(x, test)]
    left = [y for y in validation if y not in of_test]
    of_validation = [x for x in np.flatnonzero(split == TRAIN) if x not in of_test and resembles(x, left)]
    assert found.row.tolist() == sorted([*of_test, *of_validation])
    for x, y, value in zip(found.row, found.near, found.similarity):
        assert value == pytest.approx(similarity(texts[x], texts[y])) and value >= threshold - 1e-9
        assert split[y] > split[x]
    kept = np.setdiff1d(np.arange(len(texts)), found.row)
    rest = ShingleSets([pa.array([texts[i] for i in kept])], tmp_path / "rest")
    left_over = leaked(rest, prefix_index(rest, threshold), split[kept])
    assert sum(hits for hits, _ in left_over.values()) == 0
    expected = {
        SPLITS[s]: (
            sum(split[x] == s and resembles(x, np.flatnonzero(split < s)) for x in range(len(texts))),
            int((split == s).sum()),
        )
        for s in (VALIDATION, TEST)
    }
    index = prefix_index(sets, threshold)
    assert leaked(sets, index, split) == expected
    some = leaked(sets, index, split, most=3)
    for name, (hits, looked_at) in some.items():
        assert hits <= expected[name][0] and (looked_at == 0) == (expected[name][1] == 0)


def test_a_row_that_resembles_only_a_dropped_row_stays(tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(60)]
    chain = [" ".join([*words[shift:], *(f"x{i}" for i in range(shift))]) for shift in (0, 5, 10)]
    assert similarity(chain[0], chain[1]) > 0.8 and similarity(chain[1], chain[2]) > 0.8
    assert similarity(chain[0], chain[2]) < 0.8
    sets = ShingleSets([pa.array(chain)], tmp_path / "sets")
    split = np.array([TEST, TRAIN, TRAIN], np.int8)
    assert cross_split_duplicates(sets, prefix_index(sets, 0.8), split).row.tolist() == [1]
    # Test, validation, train: the validation row is dropped, or it stays and the train row resembles it.
    index, split = prefix_index(sets, 0.8), np.array([TEST, VALIDATION, TRAIN], np.int8)
    assert cross_split_duplicates(sets, index, split).row.tolist() == [1]
    reported = cross_split_duplicates(sets, index, split, dropped=False)
    assert (reported.row.tolist(), reported.near.tolist()) == ([1, 2], [0, 1])


def in_another_order(seed: int, rows: int, sentences: int, words: int) -> list[str]:
    """Rows of the same sentences."""
    rng = random.Random(seed)
    pool = [" ".join(rng.choices([f"w{i}" for i in range(400)], k=words)) + "." for _ in range(sentences)]
    return [" ".join(rng.sample(pool, sentences)) for _ in range(rows)]


def of_few_words(seed: int, rows: int, words: int) -> list[str]:
    """Long rows; one in five is the row before with a tenth of its words replaced."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array([f"w{i}" for i in range(50)])
    drawn = rng.integers(0, 50, (rows, words))
    for row in range(1, rows, 5):
        drawn[row] = np.where(np.arange(words) < words // 10, drawn[row], drawn[row - 1])
    return [" ".join(vocabulary[row]) for row in drawn]


@pytest.mark.parametrize("sentences", [6, 12, 20, 30])
def test_rows_of_the_same_sentences_in_another_order(tmp_path: Path, sentences: int) -> None:
    """Nearly all pairs meet, and hardly any is similar enough."""
    texts = in_another_order(sentences, 4_000, sentences, words=10)
    sets = ShingleSets([pa.array(texts)], tmp_path / "sets")
    near = np.arange(len(texts)) % 10 == 0
    nodes = sets.node == np.arange(len(texts))
    found = set(neighbours(sets, prefix_index(sets, 0.8), near & nodes, ~near & nodes)[0].tolist())
    near_grams = [grams(texts[y]) for y in np.flatnonzero(near & nodes)]
    for x in np.flatnonzero(~near & nodes)[::90]:
        mine = grams(texts[x])
        assert any(len(mine & g) >= 0.8 * len(mine | g) for g in near_grams) == (x in found)


def test_very_long_rows_of_few_words(tmp_path: Path) -> None:
    texts = of_few_words(0, 30, words=12_000)
    sets = ShingleSets([pa.array(texts)], tmp_path / "sets")
    near = np.arange(len(texts)) % 5 == 0
    one, other, value = neighbours(sets, prefix_index(sets, 0.8), near, ~near)
    assert one.tolist() == list(range(1, 30, 5)) and other.tolist() == list(range(0, 30, 5))
    assert value[0] == pytest.approx(similarity(texts[1], texts[0]))


LONG = (
    "please rotate the stale deploy key of the billing service before the audit on friday because the old "
    "one was seen in a public log"
)


def near_rows() -> list[dict[str, Any]]:
    other = [
        {
            "group": f"g{i}",
            "prompt": " ".join(f"{w}{i}" for w in ("a", "b", "c", "d", "e")),
            "completion": f"yes {i}",
        }
        for i in range(6)
    ]
    return [
        {"group": "held", "prompt": LONG, "completion": "Ask for evidence."},
        {"group": "copy", "prompt": LONG.upper() + "!", "completion": "ask for evidence"},
        {"group": "near", "prompt": LONG.replace("friday", "monday"), "completion": "Ask for evidence."},
        {"group": "val", "prompt": LONG.replace("old one", "former"), "completion": "Ask for evidence."},
        *other,
    ]


FIXED = {
    "test": ["held", "g0"],
    "validation": ["val", "g1"],
    "train": ["copy", "near", "g2", "g3", "g4", "g5"],
}


def test_near_duplicates_of_held_out_rows_are_dropped_counted_and_listed(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", near_rows())
    outcome = run(
        dataset(path, split={"groups": FIXED, "near_duplicates": {"threshold": 0.6}}), project / "home"
    )["grouped_split"]
    built = outcome.artifact
    assert built.manifest.accepted
    assert [(r["line"], r["reasons"]) for r in rows(built, "rejects.parquet")] == [
        (line, ["near_duplicate_of_held_out"]) for line in (2, 3, 4)
    ]
    pairs = rows(built, "near_duplicates.parquet")
    assert [(p["group"], p["side"], p["of_group"], p["of_side"]) for p in pairs] == [
        ("copy", "train", "held", "test"),
        ("near", "train", "held", "test"),
        ("val", "validation", "held", "test"),
    ]
    assert (
        pairs[0]["similarity"] == 1
        and 0.6 <= pairs[1]["similarity"] < 1
        and pairs[1]["text"].startswith("please rotate")
    )
    assert built.manifest.counts == {
        **built.manifest.counts,
        "read": 10,
        "train": 4,
        "validation": 1,
        "test": 2,
        "rejects": 3,
    }
    assert "0.00% of the held-out rows" in check(outcome, "near_duplicate_leakage")["description"]


def test_near_duplicates_may_only_be_reported_or_not_searched(project: Path) -> None:
    path = write_jsonl(project / "rows.jsonl", near_rows())
    reported = run(
        dataset(path, split={"groups": FIXED, "near_duplicates": {"threshold": 0.6, "action": "report"}}),
        project / "home",
    )["grouped_split"]
    assert reported.artifact.manifest.accepted and reported.artifact.manifest.counts["rejects"] == 0
    assert (
        reported.artifact.manifest.counts["near_duplicates"] == 3
        and len(rows(reported.artifact, "near_duplicates.parquet")) == 3
    )
    bounded = {"threshold": 0.6, "action": "report", "max_leakage": 0.1}
    blocked = run(dataset(path, split={"groups": FIXED, "near_duplicates": bounded}), project / "home")[
        "grouped_split"
    ]
    assert not blocked.artifact.manifest.accepted
    assert (
        "50.00% of the held-out rows have a near-duplicate"
        in check(blocked, "near_duplicate_leakage")["description"]
    )
    off = run(dataset(path, split={"groups": FIXED, "near_duplicates": None}), project / "home")[
        "grouped_split"
    ]
    assert off.artifact.manifest.accepted and off.artifact.manifest.counts["near_duplicates"] == 0


def test_many_rows_of_one_template_stay_cheap(tmp_path: Path) -> None:
    rng = random.Random(0)
    middle = " ".join(f"word{i}" for i in range(50))
    texts = [
        f"{rng.randrange(10**9)} {rng.randrange(10**9)} {middle} {rng.randrange(10**9)} "
        f"{rng.randrange(10**9)} {rng.randrange(10**9)} {rng.randrange(10**9)}"
        for _ in range(20_000)
    ]
    sets = ShingleSets([pa.array(texts)], tmp_path / "sets")
    asked = np.arange(len(texts)) % 2 == 0
    # 10^8 pairs at 0.86, none of which is compared on its own.
    assert len(neighbours(sets, prefix_index(sets, 0.95), ~asked, asked)[0]) == 0


def test_bounds_of_very_long_rows_are_not_lost_in_rounding(tmp_path: Path) -> None:
    """Pairs of about 0.8, a shingle more or less, in rows of several hundred thousand."""
    words = [f"w{i}" for i in range(300_000)]
    same = 8 * 300_000 // 9  # x and y share this many of their words' shingles: J = same / (2n - same)
    texts = []
    for pair in range(6):
        tail = [f"x{pair}y{i}" for i in range(300_000 - same - pair + 3)]
        texts += [" ".join([f"p{pair}", *words]), " ".join([f"p{pair}", *words[: same + pair - 3], *tail])]
    sets = ShingleSets([pa.array(texts)], tmp_path / "sets")
    index = prefix_index(sets, 0.8)
    near = np.arange(12) % 2 == 0
    one, other = np.flatnonzero(~near), np.flatnonzero(near)
    exact = np.array([[sets.similarity(np.array([x]), np.array([y]), 0.0)[0] for y in other] for x in one])
    found = set(neighbours(sets, index, near, ~near)[0].tolist())
    assert found == {x for x, row in zip(one.tolist(), exact) if (row >= 0.8).any()}
    assert found and len(found) < 6


def test_a_data_set_of_one_template_says_what_to_set(project: Path) -> None:
    template = (
        "Write a short and friendly note to the customer who has written to us twice this week about the "
        "order that was to come last month, and do not promise anything: it has the number"
    )
    lines = [
        {"group": f"g{i}", "prompt": f"{template} {i}", "completion": f"{template} {i}, please."}
        for i in range(60)
    ]
    outcome = run(dataset(write_jsonl(project / "rows.jsonl", lines)), project / "home")["grouped_split"]
    assert not outcome.artifact.manifest.accepted
    empty = check(outcome, "splits_not_empty")["description"]
    assert empty.startswith("all ") and "split.near_duplicates.threshold" in empty
    assert not check(outcome, "train_rows_kept")["passed"]


def test_one_group_with_most_of_the_rows_is_named(project: Path) -> None:
    lines = [
        {"group": "acme" if i % 10 else f"g{i}", "prompt": f"q{i} is a number", "completion": f"{i}"}
        for i in range(2_000)
    ]
    outcome = run(dataset(write_jsonl(project / "rows.jsonl", lines)), project / "home")["grouped_split"]
    found = check(outcome, "split_shares")
    assert outcome.artifact.manifest.accepted and not found["passed"] and not found["blocking"]
    assert "the largest, 'acme', has 90.0% of the rows" in found["description"]
    even = [{**line, "group": f"g{i}"} for i, line in enumerate(lines)]
    again = run(dataset(write_jsonl(project / "rows.jsonl", even)), project / "home")["grouped_split"]
    assert check(again, "split_shares")["passed"] and check(again, "train_rows_kept")["passed"]

"""Texts encoded piece by piece: the ids of the reference for any text, under any way of cutting."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from sft_pipeline.stages.tokenized_rows.word_cache import NoFastPath, WordCache
from sft_pipeline.text.tokenizer import make_tokenizer
from sft_pipeline_tests.text.tiny import SPECIAL, tiny_backend

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "digits": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "runs of digits": [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen": [
        pre_tokenizers.Split(Regex(QWEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "removed": [
        pre_tokenizers.Split(Regex(QWEN), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "cased": [
        pre_tokenizers.Split(Regex(CASED), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "newlines": [
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "deepseek": [
        pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?[!-/:-~]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s+$"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "symbols are no punctuation": [
        pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
        pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "lookahead": [
        pre_tokenizers.Split(Regex(r"[a-z]+(?=\d)|\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "nothing": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
}
PLAIN = st.text(st.sampled_from([chr(c) for c in (9, 10, 13, *range(32, 127))]), max_size=60)
WORDS = st.lists(
    st.sampled_from(["the", " key", "  ", "'s", "'LL ", "Rotate", "42", "\n\n", " \n", "!?", "a1b2", "\t"])
).map("".join)


def tokenizer(cuts, normalizer=None):
    backend: Tokenizer = tiny_backend()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
    if normalizer:
        backend.normalizer = normalizer
    return make_tokenizer(backend, special=dict(SPECIAL))


# Their words are not always cut before a space.
NEVER_CUT = {"symbols are no punctuation", "lookahead", "nothing"}
MADE = {name: tokenizer(cuts, normalizers.NFC()) for name, cuts in CUTS.items()}
FAST = {name: WordCache(made) for name, made in MADE.items() if name not in NEVER_CUT}
ANY = st.text(max_size=30)


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists((PLAIN | WORDS | ANY).filter(bool), min_size=1, max_size=4))
def test_ids_are_those_of_the_reference(name, texts):
    made, fast = MADE[name], FAST[name]
    texts = [t for t in texts if not any(token in t for token in made.added)] + ["<|im_end|>"]
    is_added = np.array([t == "<|im_end|>" for t in texts])
    found = fast.encode(pa.array(["sliced away", *texts], pa.string()).slice(1), is_added)
    for text, begin, end, faithful in zip(texts, found.ends, found.ends[1:], found.faithful):
        ids = found.ids[begin:end]
        assert ids.tolist() == made.ids(text)
        assert faithful == (fast.bytes_for(ids) == text.encode()) and (faithful or not text.isascii())
        assert fast.byte_lengths[ids].sum() == len(fast.bytes_for(ids))


def test_text_that_a_normalizer_composes_is_not_faithful():
    found = FAST["gpt2"].encode(pa.array(["plain", "e\u0301 here", "\u00e9"]), np.zeros(3, bool))
    assert found.faithful.tolist() == [True, False, True]


@pytest.mark.parametrize("name", sorted(NEVER_CUT))
def test_a_pre_tokenizer_that_does_not_always_cut_before_a_space_is_refused(name):
    with pytest.raises(NoFastPath, match="before a space"):
        WordCache(MADE[name])


def test_added_tokens_stand_for_their_text():
    made = MADE["gpt2"]
    ids = np.array([made.added["<|im_start|>"], made.added["<|im_end|>"]], np.int32)
    assert FAST["gpt2"].bytes_for(ids) == b"<|im_start|><|im_end|>"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "beginning"),
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()), "ByteLevel"),
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "Lowercase"),
        (lambda b: setattr(b.model, "dropout", 0.1), "dropout"),
        (lambda b: setattr(b.model, "unk_token", "<|pad|>"), "unk_token"),
        (lambda b: b.add_special_tokens([AddedToken("<|two words|>")]), "added tokens"),
        (lambda b: b.add_tokens([AddedToken("<|tail|>", rstrip=True)]), "added tokens"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(change, why):
    backend = tiny_backend()
    change(backend)
    with pytest.raises(NoFastPath, match=why):
        WordCache(make_tokenizer(backend, special=dict(SPECIAL)))

"""Texts in chunks against the reference: the same ids for any plain text, under any known way of cutting."""

import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from sft_pipeline.stages.tokenized_rows.boundaries import may_share_a_piece
from sft_pipeline.stages.tokenized_rows.byte_level import ODD_CONTROL, Unsupported, ascii_pattern
from sft_pipeline.stages.tokenized_rows.chunks import ChunkEncoder
from sft_pipeline.text.tokenizer import make_tokenizer
from sft_pipeline_tests.tokenized_rows.tiny import SPECIAL, tiny_backend

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
        pre_tokenizers.Split(Regex(r"\s?\p{P}+"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "looking on": [
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


MADE = {name: tokenizer(cuts, normalizers.NFC()) for name, cuts in CUTS.items()}
FAST = {name: ChunkEncoder(made) for name, made in MADE.items()}


@pytest.mark.parametrize("name", CUTS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists((PLAIN | WORDS).filter(bool), min_size=1, max_size=4), whole=st.booleans())
def test_ids_are_those_of_the_reference(name, texts, whole):
    if any(token in text for token in MADE[name].added for text in texts):
        return
    last_whole = np.arange(len(texts)) == (len(texts) - 1 if whole else -1)
    found = FAST[name].encode(pa.array(texts), last_whole, {})
    for text, begin, end in zip(texts, found.ends, found.ends[1:]):
        assert found.ids[begin:end].tolist() == MADE[name].ids(text)
        assert FAST[name].byte_level.text_of(found.ids[begin:end]) == text.encode()
    assert found.faithful.all()
    assert FAST[name].byte_level.byte_lengths[found.ids].sum() == sum(map(len, texts))


@pytest.mark.parametrize("name", CUTS)
@settings(max_examples=150, deadline=None)
@given(text=(PLAIN | WORDS).filter(bool))
def test_certain_cuts_are_cuts_of_the_reference(name, text):
    shared = may_share_a_piece(FAST[name].byte_level.patterns)
    if shared is None:
        return
    pieces = MADE[name].backend.pre_tokenizer.pre_tokenize_str(text)
    cuts = {begin for _, (begin, _) in pieces}
    certain = [i for i in range(1, len(text)) if not shared[ord(text[i - 1]), ord(text[i])]]
    assert cuts.issuperset(certain)


def test_words_are_told_apart_where_they_can_be():
    certain = {n: may_share_a_piece(FAST[n].byte_level.patterns) for n in CUTS}
    apart = {n for n, shared in certain.items() if shared is not None and not shared[ord("a"), ord(" ")]}
    assert apart == {"gpt2", "digits", "runs of digits", "qwen", "removed", "cased", "newlines", "deepseek"}


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4),
    system=st.text(min_size=1, max_size=200),
)
def test_what_is_not_plain_is_encoded_whole_and_doubted_where_its_bytes_are_lost(texts, system):
    made, fast = MADE["gpt2"], FAST["gpt2"]
    texts = [t for t in (*texts, system, "e\u0301") if not any(token in t for token in made.added)]
    fast.remember([system])
    constants = {"<|im_end|>": np.array([made.added["<|im_end|>"]], np.int32).tobytes()}
    found = fast.encode(pa.array([*texts, "<|im_end|>"]), np.ones(len(texts) + 1, bool), constants)
    for text, begin, end, faithful in zip(texts, found.ends, found.ends[1:], found.faithful):
        assert found.ids[begin:end].tolist() == made.ids(text)
        assert faithful == (made.decode(made.ids(text)) == text)
    assert not found.faithful[len(texts) - 1]  # composed by NFC
    assert found.ids[found.ends[-2] :].tolist() == [made.added["<|im_end|>"]]


def test_added_tokens_stand_for_their_text():
    made = MADE["gpt2"]
    ids = np.array([made.added["<|im_start|>"], made.added["<|im_end|>"]], np.int32)
    assert FAST["gpt2"].byte_level.text_of(ids) == b"<|im_start|><|im_end|>"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)), "beginning"),
        (lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()), "ByteLevel"),
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "Lowercase"),
        (lambda b: setattr(b.model, "dropout", 0.1), "dropout"),
        (lambda b: setattr(b.model, "unk_token", "<|pad|>"), "unk_token"),
    ],
)
def test_what_it_does_not_know_it_refuses(change, why):
    backend = tiny_backend()
    change(backend)
    with pytest.raises(Unsupported, match=why):
        ChunkEncoder(make_tokenizer(backend, special=dict(SPECIAL)))


@pytest.mark.parametrize("pattern", [r"[\p{L}&&[^a]]+", r"\X", r"\K\w"])
def test_patterns_that_python_reads_otherwise_are_refused(pattern):
    with pytest.raises(Unsupported):
        ascii_pattern(pattern)


def test_categories_are_written_out_for_ascii():
    assert re.fullmatch(ascii_pattern(r"\p{Lu}[\p{Ll}\p{N}]+\P{L}"), "Key7-", re.ASCII)
    assert re.fullmatch(ascii_pattern(r"[^\p{L}]\p{P}"), "7!", re.ASCII)
    assert re.search(ODD_CONTROL, "\x0b") and not re.search(ODD_CONTROL, "\t\r\n")

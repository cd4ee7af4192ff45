"""The fast byte-level BPE against its reference: the same ids for any plain text, under any known way of cutting."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from sft_pipeline.stages.tokenized_rows.pieces import ODD_CONTROL, PieceEncoder, Unsupported, ascii_pattern
from sft_pipeline.stages.tokenized_rows.tokenizer import make_tokenizer
from sft_pipeline_tests.tokenized_rows.tiny import SPECIAL, tiny_backend

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "digits": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "runs of digits": [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen": [pre_tokenizers.Split(Regex(QWEN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "removed": [pre_tokenizers.Split(Regex(QWEN), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "cased": [pre_tokenizers.Split(Regex(CASED), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "newlines": [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "nothing": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
}  # fmt: skip
PLAIN = st.text(st.sampled_from([chr(c) for c in (9, 10, 13, *range(32, 127))]), max_size=60)
WORDS = st.lists(st.sampled_from(["the", " key", "  ", "'s", "'LL ", "Rotate", "42", "\n\n", " \n", "!?", "a1b2", "\t"])).map("".join)  # fmt: skip


def tokenizer(cuts, normalizer=None):
    backend: Tokenizer = tiny_backend()
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(cuts))
    if normalizer:
        backend.normalizer = normalizer
    return make_tokenizer(backend, special=dict(SPECIAL))


MADE = {name: tokenizer(cuts, normalizers.NFC()) for name, cuts in CUTS.items()}
FAST = {name: PieceEncoder(made) for name, made in MADE.items()}


@pytest.mark.parametrize("name", CUTS)
@settings(max_examples=150, deadline=None)
@given(text=PLAIN | WORDS)
def test_ids_are_those_of_the_reference(name, text):
    if any(token in text for token in MADE[name].added):
        return
    ids = np.frombuffer(FAST[name].encode(text), np.int32)
    assert ids.tolist() == MADE[name].ids(text)
    assert FAST[name].text_of(ids) == text.encode()
    assert FAST[name].byte_lengths[ids].sum() == len(text)


def test_added_tokens_stand_for_their_text():
    made = MADE["gpt2"]
    ids = np.array([made.added["<|im_start|>"], made.added["<|im_end|>"]], np.int32)
    assert FAST["gpt2"].text_of(ids) == b"<|im_start|><|im_end|>"


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
        PieceEncoder(make_tokenizer(backend, special=dict(SPECIAL)))


@pytest.mark.parametrize("pattern", [r"[\p{L}&&[^a]]+", r"\X", r"\K\w"])
def test_patterns_that_python_reads_otherwise_are_refused(pattern):
    with pytest.raises(Unsupported):
        ascii_pattern(pattern)


def test_categories_are_written_out_for_ascii():
    assert re.fullmatch(ascii_pattern(r"\p{Lu}[\p{Ll}\p{N}]+\P{L}"), "Key7-", re.ASCII)
    assert re.fullmatch(ascii_pattern(r"[^\p{L}]\p{P}"), "7!", re.ASCII)
    assert re.search(ODD_CONTROL, "\x0b") and not re.search(ODD_CONTROL, "\t\r\n")

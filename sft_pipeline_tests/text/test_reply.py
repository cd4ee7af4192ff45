"""Replies as text: what ends them, and what of the template is removed from them."""

import pytest

from sft_pipeline.text.reply import ReplyDecoder


def decoder(stop_text=None):
    """Ids are code points."""
    return ReplyDecoder(frozenset({0}), 0, lambda ids: "".join(map(chr, ids)), stop_text)


def ids(text):
    return [ord(c) for c in text]


def test_a_reply_is_its_text_and_ends_as_it_was_generated():
    for finished in (True, False):
        found = decoder().reply(ids("yes"), finished, target=ids("no\n"), completion="no")
        assert found == ("yes", finished)


@pytest.mark.parametrize(
    ("generated", "reply"),
    [
        ("<think></think>\nyes</answer>", "yes"),
        ("yes</answer>", "yes"),
        ("<think>hm</think>\nyes", "<think>hm</think>\nyes"),
    ],
)
def test_what_the_template_puts_around_every_answer_is_removed(generated, reply):
    target = ids("<think></think>\nno</answer>")
    assert decoder().reply(ids(generated), True, target=target, completion="no") == (reply, True)


def test_white_space_around_the_completion_stays_the_models_own():
    assert decoder().reply(ids("\nyes"), True, target=ids("\nno\n"), completion="no") == ("\nyes", True)


def test_a_stop_text_of_several_tokens_ends_the_reply():
    with_stop = decoder("<end>")
    found = with_stop.reply(ids("yes<end>and more"), False, target=ids("no<end>"), completion="no")
    assert found == ("yes", True)
    assert with_stop.reply(ids("yes<en"), False, target=ids("no<end>"), completion="no") == ("yes<en", False)


def test_without_a_completion_the_whole_text_is_the_reply_and_the_whole_turn_is_expected():
    target = ids("<call>find</call>\0\n")
    assert decoder().reply(ids("<call>get</call>"), True, target=target, completion="") == (
        "<call>get</call>",
        True,
    )
    assert decoder().expected(target, "") == "<call>find</call>"
    assert decoder("<end>").expected(ids("<call>find</call><end>\n"), "") == "<call>find</call>"
    assert decoder().expected(target, "find") == "find"

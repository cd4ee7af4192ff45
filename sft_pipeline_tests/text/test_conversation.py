"""The guard against text that a tokenizer would turn into control tokens."""

import pytest

from sft_pipeline.text.conversation import ForgeryGuard, conversation
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.reasons import Reason, Rejected
from sft_pipeline_tests.text.tiny import CHATML, tiny_tokenizer


def two_turns(question, answer):
    return conversation(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    )


def test_added_tokens_that_the_template_writes_are_forgeries_only_outside_the_assistants_turns():
    tokenizer = tiny_tokenizer(CHATML + "{# #}{% if false %}<think>{% endif %}")
    tokenizer.added["<think>"] = 9999
    guard = ForgeryGuard(tokenizer, load_template("tokenizer", tokenizer), "reject")
    with pytest.raises(Rejected, match="<think>") as rejected:
        guard.check(two_turns("a <think> b", "yes"))
    assert rejected.value.reason is Reason.CONTROL_TOKEN_IN_TEXT
    by_assistant = two_turns("a", "a <think> b")
    assert guard.check(by_assistant) is by_assistant


def test_a_system_message_is_added_only_where_there_is_none():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    added = conversation({"messages": messages}, "Be brief.")
    assert [m["role"] for m in added.messages] == ["system", "user", "assistant"]
    own = [{"role": "system", "content": "Be kind."}, *messages]
    assert conversation({"messages": own}, "Be brief.").messages == own

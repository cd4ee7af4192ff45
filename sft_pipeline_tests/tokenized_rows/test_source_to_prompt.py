"""What a row says is what is trained: real tokenizers, their own templates, and the text that is right."""

import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sft_pipeline.stages.tokenized_rows.config import TokensConfig
from sft_pipeline.stages.tokenized_rows.row_encoder import AcceptedRow, RejectedRow, RowEncoder
from sft_pipeline.stages.validated_rows.config import ContractConfig, SourceShape, ValidatedRowsConfig
from sft_pipeline.stages.validated_rows.validate import RowValidator
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.config import NAMED_TEMPLATES
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.tokenizer import load_tokenizer
from sft_pipeline_tests.differential.compare import Comparison
from sft_pipeline_tests.differential.space import Pairing

pytestmark = pytest.mark.shared_data

USER = {"role": "user", "content": "Three times two?"}
ANSWER = {"role": "assistant", "content": "Six."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "book", "arguments": {"when": "Friday", "guests": 4}}}
    ],
}
TOOLS = [
    {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}
]


@pytest.fixture(scope="module")
def encoder(shared_data: Path):
    @lru_cache
    def make(
        name: str,
        template: str = "tokenizer",
        supervise: str = "completion",
        variables: str = "{}",
        ignore=(),
    ):
        tokenizer = load_tokenizer(str(shared_data / "tokenizers" / name))
        tokens = TokensConfig(max_length=4096, supervise=supervise)
        return RowEncoder(
            tokenizer, load_template(template, tokenizer, json.loads(variables)), tokens, ignore=ignore
        )

    return make


def encode(
    encoder: RowEncoder, *messages: dict[str, Any], line: str = "", **row: Any
) -> AcceptedRow | RejectedRow:
    """One source row through validation and encoding."""
    content = line or json.dumps({"messages": list(messages), **row})
    config = ValidatedRowsConfig(
        contract=ContractConfig(), shapes=[SourceShape(format="messages", columns={})]
    )
    batch = pa.RecordBatch.from_pydict(
        {
            "row_id": ["0" * 32],
            "source": pa.array([0], pa.int32()),
            "file": ["f"],
            "line": [1],
            "content": [content],
        }
    )
    found = RowValidator(config, [None])(batch)
    assert found.reasons == []
    (result,) = encoder.encode([{**r, "row_id": "0" * 32} for r in found.rows.to_pylist()])
    return result


def trained(encoder: RowEncoder, result: AcceptedRow | RejectedRow) -> list[str]:
    """The text of each supervised span."""
    assert isinstance(result, AcceptedRow), result
    (example,) = result.examples
    on = (example.labels != IGNORE_LABEL).tolist()
    edges = [i for i in range(len(on) + 1) if (i < len(on) and on[i]) != (i > 0 and on[i - 1])]
    ids = example.input_ids.tolist()
    return [encoder.tokenizer.decode(ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def whole(encoder: RowEncoder, result: AcceptedRow | RejectedRow) -> str:
    assert isinstance(result, AcceptedRow), result
    return encoder.tokenizer.decode(result.examples[0].input_ids.tolist())


@pytest.mark.parametrize("alias", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_trained(encoder, alias: str) -> None:
    qwen = encoder("qwen3")
    reply = {"role": "assistant", alias: "Three times two is six.", "content": "Six."}
    expected = ["<think>\nThree times two is six.\n</think>\n\nSix.<|im_end|>"]
    assert trained(qwen, encode(qwen, USER, reply)) == expected


def test_reasoning_alone_is_trained(encoder) -> None:
    qwen = encoder("qwen3")
    result = encode(qwen, USER, {"role": "assistant", "reasoning_content": "Hm."})
    assert trained(qwen, result) == ["<think>\nHm.\n</think>\n\n<|im_end|>"]


def test_reasoning_that_holds_the_answer(encoder) -> None:
    qwen = encoder("qwen3")
    reply = {"role": "assistant", "reasoning_content": "It is six, I think: six.", "content": "six"}
    assert trained(qwen, encode(qwen, USER, reply)) == [
        "<think>\nIt is six, I think: six.\n</think>\n\nsix<|im_end|>"
    ]


def test_reasoning_that_the_template_drops_in_history_is_not_trained_away(encoder) -> None:
    qwen = encoder("qwen3", supervise="assistant")
    thought = {"role": "assistant", "reasoning_content": "Hm.", "content": "Six."}
    result = encode(qwen, USER, thought, USER, {"role": "assistant", "content": "Still six."})
    assert trained(qwen, result) == ["<think>\n\n</think>\n\nStill six.<|im_end|>"]
    assert result.turns_not_supervised == 1


@pytest.mark.parametrize("name", ["smollm2", "phi-3-mini"])
def test_reasoning_that_the_template_cannot_write_is_refused(encoder, name: str) -> None:
    reply = {"role": "assistant", "reasoning_content": "Hm.", "content": "Six."}
    result = encode(encoder(name), USER, reply)
    assert (str(result.reason), result.detail) == ("field_not_rendered", "reasoning_content")
    ignoring = encoder(name, ignore=("reasoning_content",))
    assert trained(ignoring, encode(ignoring, USER, reply))[0].startswith("Six.")


def test_a_variable_of_the_template(encoder) -> None:
    off = encoder("qwen3", variables='{"enable_thinking": false}')
    result = encode(off, USER, {"role": "assistant", "content": "Six."})
    assert trained(off, result) == ["Six.<|im_end|>"]
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\nSix." in whole(off, result)


def test_arguments_keep_their_order_and_spelling(encoder) -> None:
    qwen = encoder("qwen3")
    call = (
        '{"type":"function","function":{"name":"book","arguments":{"when":"Friday","guests":4,"tip":1.50}}}'
    )
    line = f'{{"messages":[{json.dumps(USER)},{{"role":"assistant","content":"","tool_calls":[{call}]}}],'
    line += f'"tools":{json.dumps(TOOLS)}}}'
    (text,) = trained(qwen, encode(qwen, line=line))
    assert '{"name": "book", "arguments": {"when": "Friday", "guests": 4, "tip": 1.50}}' in text


def test_arguments_that_are_text_are_written_as_they_are(encoder) -> None:
    qwen = encoder("qwen3")
    function = {"name": "book", "arguments": '{"when":"Friday","guests":4,"tip":1.50}'}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    (text,) = trained(qwen, encode(qwen, USER, call, tools=TOOLS))
    assert '"arguments": {"when":"Friday","guests":4,"tip":1.50}}' in text


@pytest.mark.parametrize("name", ["smollm2", "phi-3-mini", "olmo2-dolma2"])
def test_a_call_that_the_template_does_not_write_is_refused(encoder, name: str) -> None:
    for messages in ([USER, CALL], [USER, {**CALL, "content": "I call."}]):
        result = encode(encoder(name), *messages)
        assert (str(result.reason), result.detail) == ("field_not_rendered", "tool_calls")
    earlier = [USER, CALL, {"role": "tool", "content": "done"}, {"role": "assistant", "content": "Booked."}]
    assert isinstance(encode(encoder(name), *earlier), RejectedRow)


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
def test_a_call_under_a_named_template_is_written_or_refused(encoder, template: str) -> None:
    one = encoder("qwen3" if template in ("chatml", "qwen") else "smollm2", template)
    result = encode(one, USER, CALL)
    if isinstance(result, RejectedRow):
        assert str(result.reason) in ("field_not_rendered", "template_error")
    else:
        assert "book" in trained(one, result)[0] and "Friday" in trained(one, result)[0]


def test_tools_that_do_not_reach_the_text_are_refused(encoder) -> None:
    result = encode(encoder("smollm2"), USER, {"role": "assistant", "content": "Six."}, tools=TOOLS)
    assert (str(result.reason), result.detail) == ("field_not_rendered", "tools")


@pytest.mark.parametrize("edge", [" Six.", "\nSix.", "  Six.", "\n\nSix.", "\tSix."])
@pytest.mark.parametrize("name", ["phi-3-mini", "qwen3", "smollm2"])
def test_an_earlier_answer_that_begins_with_white_space(encoder, name: str, edge: str) -> None:
    one = encoder(name, supervise="assistant")
    result = encode(
        one, USER, {"role": "assistant", "content": edge}, USER, {"role": "assistant", "content": "Yes."}
    )
    found = trained(one, result)
    assert "Yes." in found[-1]
    assert len(found) + result.turns_not_supervised == 2


@pytest.mark.parametrize("reply", ["Done 😀", "é", "👩‍👩‍👧", "中文", "a\u0301"])
@pytest.mark.parametrize("name", ["phi-3-mini", "qwen3", "smollm2", "gpt2"])
def test_an_answer_that_ends_in_several_tokens_without_a_stop_token(
    encoder, tmp_path: Path, name: str, reply: str
) -> None:
    path = tmp_path / "bare.jinja"
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    path.write_text(turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    one = encoder(name, str(path))
    (text,) = trained(one, encode(one, USER, {"role": "assistant", "content": reply}))
    assert unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", reply)


@pytest.mark.parametrize("content", ["user", "im", "start", "Three times two?"])
def test_weight_0_masks_the_content_and_not_the_header(encoder, content: str) -> None:
    qwen = encoder("qwen3", supervise="all")
    asked = {"role": "user", "content": content, "weight": 0}
    found = trained(qwen, encode(qwen, asked, {"role": "assistant", "content": "Six."}))
    assert found[0].endswith("im_start|>user\n") or found[0].endswith("user\n")
    assert found[1].startswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("supervise", ["completion", "assistant", "last_turn", "all"])
def test_a_weight_is_that_of_its_message_s_tokens(encoder, supervise: str) -> None:
    qwen = encoder("qwen3", supervise=supervise)
    messages = [
        {**USER, "weight": 3},
        {"role": "assistant", "content": "Fünf, oder?", "weight": 0.25},
        {"role": "user", "content": "Nein."},
        {"role": "assistant", "content": "Sechs.", "weight": 0.5},
    ]
    (example,) = encode(qwen, *messages).examples
    texts: dict[float, str] = {}
    for token, label, weight in zip(example.input_ids, example.labels, example.weights, strict=True):
        assert (label != IGNORE_LABEL) == (weight > 0)
        texts[weight] = texts.get(weight, "") + qwen.tokenizer.decode([int(token)])
    assert "Sechs.<|im_end|>" in texts[0.5] and "Nein" not in texts[0.5]
    if supervise in ("assistant", "all"):
        assert texts[0.25].startswith("Fünf, oder?")
    if supervise == "all":
        assert texts[3.0] == USER["content"] and "Nein.<|im_end|>" in texts[1.0]
    else:
        assert 1.0 not in texts and 3.0 not in texts


def test_weights_of_1_and_0_are_no_weights(encoder) -> None:
    for weights in ((1, 1), (0, 1), (None, 1.0)):
        asked, answered = ({**m, "weight": w} for m, w in zip((USER, ANSWER), weights, strict=True))
        (example,) = encode(encoder("qwen3", supervise="all"), asked, answered).examples
        assert example.weights is None


@pytest.mark.parametrize("result", ['{"temp": 20}', "plain", 'say "hi"'])
def test_a_result_that_the_template_quotes_does_not_cost_the_turn_before_it(
    tmp_path: Path, result: str
) -> None:
    """llama3_1 in TRL's package writes results of tools through tojson."""
    pairing = Pairing("llama3_1")
    encoder = Comparison(pairing, "assistant").encoder
    found = encode(
        encoder,
        USER,
        CALL,
        {"role": "tool", "name": "book", "tool_call_id": "a", "content": result},
        {"role": "assistant", "content": "Booked."},
        tools=TOOLS,
    )
    assert isinstance(found, AcceptedRow), found
    assert len(trained(encoder, found)) == 2


def test_reasoning_of_a_weightless_message_is_never_trained(encoder, tmp_path: Path) -> None:
    path = tmp_path / "odd.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.reasoning_content and not loop.last %}({{ m.reasoning_content }})"
        "{% elif m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    one = encoder("qwen3", str(path), supervise="all")
    masked = {"role": "assistant", "content": "no", "reasoning_content": "secret", "weight": 0}
    found = encode(one, USER, masked, USER, {**ANSWER, "reasoning_content": "because"})
    assert isinstance(found, RejectedRow) or "secret" not in "".join(trained(one, found))


@pytest.mark.parametrize("content", ["\nq\n\n", " q ", "\n\nq", "q\n", "\tq \n"])
@pytest.mark.parametrize("strip", ["lstrip", "rstrip", "strip", "lstrip('\\n')", "rstrip('\\n')"])
def test_a_weightless_content_is_masked_whole_however_it_is_stripped(
    encoder, tmp_path: Path, content: str, strip: str
) -> None:
    call = strip if "(" in strip else f"{strip}()"
    path = tmp_path / "strip.jinja"
    path.write_text(
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}:{{{{ m.content.{call} }}}}<|im_end|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    one = encoder("qwen3", str(path), supervise="all")
    found = encode(one, {"role": "user", "content": content, "weight": 0}, ANSWER)
    if isinstance(found, RejectedRow):  # the colon and a newline after it are one token
        assert str(found.reason) == "mask_disagreement" and call.startswith("rstrip")
        return
    spans = trained(one, found)
    assert spans[0].endswith(":") and spans[1].startswith("<|im_end|>"), spans

"""Reading tokenizer files and templates; an error names the file and what is wrong with it."""

import json

import jinja2
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.template import ChatTemplate
from sft_pipeline.text.tokenizer import load_tokenizer
from sft_pipeline_tests.text.tiny import CHATML, MARKED, save_tokenizer, tiny_tokenizer

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def test_special_tokens_may_be_text_or_dicts_and_templates_a_list(tmp_path):
    folder = save_tokenizer(tmp_path, template=None, eos_token={"content": "<|im_end|>", "special": True})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "T" + CHATML},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.special["eos_token"] == "<|im_end|>" and tokenizer.generation_eos == (3, 4)
    template = load_template("tokenizer", tokenizer)
    assert template.render(HI).startswith("<|im_start|>")
    assert template.render(HI, [{"name": "f"}]).startswith("T<|im_start|>")


def test_a_jinja_file_beside_the_tokenizer_comes_before_its_config(tmp_path):
    folder = save_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text("X" + CHATML)
    assert load_template("tokenizer", load_tokenizer(str(folder))).render(HI).startswith("X")


def test_a_recipe_may_name_a_jinja_file_and_its_syntax_errors_have_a_line(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    assert load_template(str(path), tiny_tokenizer()).stop == "<|im_end|>"
    path.write_text("{% for m in messages %}")
    with pytest.raises(InputError, match=r"mine\.jinja, line 1"):
        load_template(str(path), tiny_tokenizer())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "fast tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "not a readable tokenizer.json"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json"),
    ],
)
def test_broken_files_are_named(tmp_path, spoil, message):
    folder = save_tokenizer(tmp_path / "tok")
    spoil(folder)
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(folder))


def test_a_missing_folder_and_an_unpinned_hub_id_give_different_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="pin it to a commit"):
        load_tokenizer("owner/name")


def test_an_unknown_template_lists_the_known_ones():
    with pytest.raises(InputError, match="chatml, llama3, qwen, mistral, alpaca, plain"):
        load_template("chatlm", tiny_tokenizer())


@pytest.mark.parametrize("marked", [MARKED, MARKED.replace("{% generation %}", "{%+ generation %}")])
def test_generation_marks_of_either_template_are_found_and_in_no_text(marked):
    for template in (ChatTemplate("own", CHATML, marked, {}), ChatTemplate("own", marked, CHATML, {})):
        for tools in (None, [{"name": "f"}]):
            plain = ChatTemplate("own", CHATML, CHATML, {}).render(HI, tools)
            text, spans = template.render_marked(HI, tools)
            assert template.render(HI, tools) == text == plain
            has_marks = (template.tool_text if tools else template.text) == marked
            assert [text[slice(*span)] for span in spans] == (["yes<|im_end|>"] if has_marks else [])


def test_the_clock_is_frozen():
    tokenizer = tiny_tokenizer("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    template = load_template("tokenizer", tokenizer)
    assert template.uses_clock and template.render(HI).startswith("2024-07-26<|im_start|>")


def test_the_fingerprint_follows_the_files(tmp_path):
    folder = save_tokenizer(tmp_path)
    before = load_tokenizer(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|pad|>"}))
    after = load_tokenizer(str(folder))
    assert before.sha256 != after.sha256
    assert load_template("tokenizer", before).sha256 != load_template("tokenizer", after).sha256


def test_templates_run_in_a_sandbox():
    template = load_template("tokenizer", tiny_tokenizer("{{ ''.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(jinja2.TemplateError, match="unsafe"):
        template.render(HI)


@pytest.mark.shared_data
def test_phi_3_ends_turns_with_a_token_that_is_not_eos(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "phi-3-mini"))
    assert load_template("tokenizer", tokenizer).stop == "<|end|>" != tokenizer.special["eos_token"]


def test_a_tokenizer_without_a_template_asks_for_a_named_one():
    with pytest.raises(InputError, match="chatml"):
        load_template("tokenizer", tiny_tokenizer(template=None))

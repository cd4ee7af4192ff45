"""Chat templates that loop without end, fill the memory or cannot be read: one message, in bounded time."""

from pathlib import Path

import jinja2
import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from sft_pipeline_tests.text.tiny import CHATML, save_tokenizer

LOOP = "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4
DOUBLING = (
    "{% set ns = namespace(s='abcdefgh') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(save_tokenizer(tmp_path_factory.mktemp("bounds"), CHATML)), None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (LOOP, "did not finish within 1 s"),
        ("{% if tools %}" + LOOP + "{% endif %}ok", "did not finish within 1 s"),
        ("{% if messages[0].role == 'system' %}" + LOOP + "{% endif %}ok", "did not finish within 1 s"),
        ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}" + LOOP, "did not finish within 1 s"),
        ("{{ 9 ** (9 ** 9) }}", "did not finish within 1 s"),  # folded while it is compiled
        ("{% set n = messages | length + 8 %}{{ n ** (n ** n) }}", "did not finish within 1 s"),
        ("{{ 'a' * 99999999999 }}", "GiB of memory"),
        ("{{ 'a' | center(99999999999) }}", "GiB of memory"),
        (DOUBLING, "GiB of memory|within 1 s"),
        ("{{ 'a' * 2000000 }}", "gave 2,000,000 characters"),
    ],
)
def test_a_template_that_does_not_end(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.setattr("sft_pipeline.bounded.SECONDS", 1.0)
    path = tmp_path / "chat.jinja"
    path.write_text(source)
    with pytest.raises(InputError, match=words) as raised:
        load_template(str(path), tokenizer)
    assert str(path) in str(raised.value)


def test_a_tokenizers_own_template_is_tried_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_pipeline.bounded.SECONDS", 1.0)
    own = load_tokenizer(str(save_tokenizer(tmp_path / "own", LOOP)), None)
    with pytest.raises(InputError, match=r"chat_template: rendering .* did not finish"):
        load_template("tokenizer", own)


@pytest.mark.parametrize("expression", ["1 / 0", "2.0 ** 99999", "messages['x'].y.z"])
def test_what_an_expression_raises_is_the_templates_error(
    tokenizer: Tokenizer, tmp_path: Path, expression: str
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{% if messages | length > 4 %}{{ " + expression + " }}{% endif %}ok")
    template = load_template(str(path), tokenizer)
    with pytest.raises(jinja2.TemplateError):
        template.render([{"role": "user", "content": "x"}] * 5)


def test_a_template_nested_too_deeply_is_told(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}")
    with pytest.raises((InputError, jinja2.TemplateError)):
        load_template(str(path), tokenizer).render([{"role": "user", "content": "x"}])

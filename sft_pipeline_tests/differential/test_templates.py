"""Every row that is accepted is what transformers makes of its source; every other one is refused by name."""

from collections import Counter
from pathlib import Path

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline_tests.differential.compare import Comparison
from sft_pipeline_tests.differential.space import Pairing, pairings, rows, templates

NAMES = sorted(templates())
DAILY = 12  # every so many-th template; all of them in the slow test


def _differences(pairing: Pairing, supervise: str, seeds: range) -> tuple[list[str], Counter[str]]:
    """(what differs, how many rows had which outcome)"""
    comparison = Comparison(pairing, supervise)
    given = [(shape, row) for seed in seeds for shape, row in rows(seed)]
    found = comparison.compare([row for _, row in given])
    wrong = [
        f"{pairing}, {shape}: {one.outcome}\n{one.detail}"
        for (shape, _), one in zip(given, found, strict=True)
        if one.outcome.startswith("different:")
    ]
    return wrong, Counter(f"{one.outcome}: {one.detail}".rstrip(": ") for one in found)


@pytest.mark.parametrize("supervise", ["completion", "assistant"])
@pytest.mark.parametrize("name", [*NAMES[::DAILY], "cohere2", "llama3_1", "phi3", "qwen3"])
def test_rows_are_what_transformers_makes_of_their_source(name: str, supervise: str) -> None:
    wrong, outcomes = _differences(Pairing(name), supervise, range(2))
    assert wrong == []
    # Templates of some vision models take no content that is plain text.
    without_text = ("refused: field_not_rendered: content", "refused: template_error")
    assert outcomes["equal"] >= 4 or all(why.startswith(without_text) for why in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_template(name: str) -> None:
    wrong = [
        w
        for supervise in ("completion", "assistant")
        for w in _differences(Pairing(name), supervise, range(3))[0]
    ]
    assert wrong == []


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "name",
    [
        "smollm2",
        "phi-3-mini",
        "gpt2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "olmo2-dolma2")),
    ],
)
def test_real_tokenizers_under_their_own_and_the_named_templates(shared_data: Path, name: str) -> None:
    wrong, seen = [], 0
    for pairing in pairings(shared_data / "tokenizers"):
        if pairing.tokenizer is None or pairing.tokenizer.name != name:
            continue
        try:
            found = _differences(pairing, "assistant", range(1))
        except InputError:  # gpt2 has no template of its own
            assert (name, pairing.template) == ("gpt2", "tokenizer")
            continue
        wrong += found[0]
        seen += found[1]["equal"]
    assert wrong == [] and seen >= 30

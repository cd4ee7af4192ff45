"""Graders tried on a few rows before anything is trained."""

import json

import pytest
from pydantic import TypeAdapter

from sft_pipeline.errors import InputError
from sft_pipeline.graders.config import GraderConfig
from sft_pipeline.graders.trial import try_graders
from sft_pipeline.stages.evaluation.config import EvaluationConfig
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig, SanityConfig
from sft_pipeline.store import Store
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline_tests.evaluation import world as w

# Python graders of the tests below.


def strict(reply, completion, row):
    return json.loads(reply) == completion


def leaving(reply, completion, row):
    raise SystemExit(0)


def in_words(reply, completion, row):
    return "high"


def never(reply, completion, row):
    return 0


def length(reply, completion, row):
    assert set(row) == {"row_id", "group", "prompt", "completion"} and row["completion"] == completion
    return len(reply) / len(completion)


def python(function, name="mine"):
    return {"name": name, "kind": "python", "callable": f"{__name__}:{function.__name__}"}


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    root = tmp_path_factory.mktemp("trial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_PROJECT_ROOT", str(root))
        patch.setenv("SFT_HOME", str(root / "home"))
        w.write_base(root / "base")
        world = w.World(root, Store(root / "home"))
        splits = {"train": w.rows_of(0, 4), "validation": w.rows_of(4, 12), "test": w.rows_of(16, 4)}
        yield w.tokenized(world, w.dataset(world, splits)["grouped_split"])


def tried(tokenized, *graders, max_rows=None):
    configs = [TypeAdapter(GraderConfig).validate_python(g) for g in graders]
    return {row.pop("grader"): row for row in try_graders(configs, tokenized, max_rows)}


@pytest.mark.parametrize(
    ("grader", "words"),
    [
        (python(strict), "grader mine, row .* raised JSONDecodeError"),
        (python(leaving), "grader mine, row .* raised SystemExit"),
        (python(in_words), "returned 'high', not a finite number"),
        ({"name": "mine", "kind": "python", "callable": "no_such_module:f"}, "grader mine: no_such_module"),
        ({"name": "id", "kind": "json_fields", "fields": ["id"]}, "grader id: no expected completion has"),
        ({"name": "n", "kind": "regex", "pattern": "(#### )", "group": 1}, "grader n: no expected"),
        ({"name": "n", "kind": "numeric_answer"}, "grader n: no expected"),
    ],
)
def test_a_grader_that_would_end_the_evaluation_ends_here(tokenized, grader, words):
    with pytest.raises(InputError, match=words):
        tried(tokenized, grader)


def test_expected_completions_and_odd_replies_are_scored(tokenized):
    exact = {"name": "same", "kind": "exact_match"}
    found = tried(tokenized, python(length), exact, python(never, "never"))
    assert found["same"] == {"expected_completions": 1, "odd_replies": 0}
    assert found["mine"]["expected_completions"] == 1 and found["mine"]["odd_replies"] > 1
    assert found["never"] == {"expected_completions": 0, "odd_replies": 0}
    assert tried(tokenized) == {}


def test_splits_without_rows_are_no_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(tmp_path))
    w.write_base(tmp_path / "base")
    world = w.World(tmp_path, Store(tmp_path / "home"))
    split = w.dataset(world, {"train": w.rows_of(0, 4), "validation": [], "test": []})["grouped_split"]
    found = tried(w.tokenized(world, split), {"name": "same", "kind": "exact_match"})
    assert found == {"same": {"expected_completions": None, "odd_replies": None}}


def test_what_the_sanity_check_is_made_for(tmp_path):
    """Other graders are tried again; what decides only afterwards, such as a gate, asks for nothing new."""

    def identity(graders, **evaluation):
        return SanityCheckConfig(
            sanity=SanityConfig(),
            model=ModelConfig(base="base"),
            training=TrainingConfig(),
            evaluation=EvaluationConfig(graders=graders, **evaluation),
            tokenizer="base",
            tokenizer_revision=None,
            template={},
            tokens={},
        ).identity()

    exact = {"name": "same", "kind": "exact_match"}
    assert identity([exact]) == identity([exact], gates=["same >= 0.5"], rank_by=["same"])
    assert identity([exact]) != identity([python(never)])

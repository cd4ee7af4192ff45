"""Names that MLflow refuses are written so that it takes them, and no two become one."""

import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.stage import Branch
from sft_pipeline.tracking.mlflow import MlflowTracker, log_params
from sft_pipeline.tracking.names import accepted_name, flatten
from sft_pipeline_tests.tracking.artifacts import BRANCH, track

ODD = ["a%b", "a-x25-b", "a-b", "a:b", "/a", "a/", "a//b", "a/b", "a/../b", ".", "..", "..a", "", "-x-"]
ODD += ["a\n", "a ", "é", "\ud800", "💡", "<b>", "a\x00b", "x" * 251, "x" * 250 + "y", "x" * 250, "%" * 90]
NAMES = st.one_of(st.text(max_size=8), st.text(alphabet="-x25f/.% a", max_size=12), st.sampled_from(ODD))


def refused_by_mlflow(name: str) -> bool:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name, _validate_param_name

    try:
        _validate_metric_name(name)
        _validate_param_name(name)
    except MlflowException:
        return True
    return len(name) > MAX_ENTITY_KEY_LENGTH


@settings(deadline=None)
@given(NAMES)
def test_mlflow_takes_every_name_and_one_that_it_takes_stays(name: str) -> None:
    assert not refused_by_mlflow(accepted_name(name))
    if len(name) <= 250 and re.fullmatch(r"\w+(/\w+)*", name):
        assert accepted_name(name) == name


@settings(deadline=None)
@given(st.lists(NAMES, unique=True, max_size=40))
def test_no_two_names_become_one(names: list[str]) -> None:
    assert len({accepted_name(name) for name in names}) == len(names)
    assert len({accepted_name(name) for name in ODD}) == len(set(ODD))


KEYS = st.text(alphabet='ab."', max_size=3)
TREES = st.recursive(st.integers(), lambda t: st.dictionaries(KEYS, t, min_size=1, max_size=3), max_leaves=8)


def leaves(tree: object) -> int:
    return sum(map(leaves, tree.values())) if isinstance(tree, dict) else 1


@settings(deadline=None)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=3))
def test_no_two_keys_of_a_nested_mapping_become_one(tree: dict) -> None:
    assert len(flatten(tree)) == leaves(tree)


def test_the_keys_of_a_recipe_stay_as_they_are() -> None:
    recipe = BRANCH.require_recipe().model_dump(mode="json", include={"model", "training"})
    assert {"training.epochs", "model.lora.r"} <= set(flatten(recipe))


def test_metrics_and_parameters_of_any_name_arrive(client, home: Path) -> None:
    odd = [name for name in ODD if name.isprintable() and name != "\ud800"]
    with track("trained_checkpoints", "2" * 64, {}) as tracked:
        tracked.report.metrics({name: float(n) for n, name in enumerate(odd)}, 1)
        tracked.report.metrics({name: float(n) for n, name in enumerate(odd)}, 2)
    run = client.get_run(tracked.run_id)
    assert {name: run.data.metrics[accepted_name(name)] for name in odd} == {
        name: float(n) for n, name in enumerate(odd)
    }
    many = {f"p{n}%": str(n) for n in range(250)} | {name: "odd" for name in odd}
    for _ in range(2):  # a parameter that is there is not logged again
        log_params(client, tracked.run_id, many)
    params = client.get_run(tracked.run_id).data.params
    assert all(params[accepted_name(name)] == value for name, value in many.items())


def test_a_template_s_variables_of_any_name_are_parameters(client) -> None:
    recipe = BRANCH.require_recipe()
    template = recipe.template.model_copy(update={"variables": {"a%": 1, "a.b": 2, "": 3}})
    branch = Branch(BRANCH.dataset, "s1", recipe.model_copy(update={"template": template}))
    with MlflowTracker(None)(STAGES["trained_checkpoints"], branch, "2" * 64, {}, Reporter()) as tracked:
        pass
    params = client.get_run(tracked.run_id).data.params
    assert sorted(v for k, v in params.items() if k.startswith("template.variables.")) == ["1", "2", "3"]

"""What the tags of a run may set, and what they may not."""

import json
from pathlib import Path

import dagster as dg
import pytest

from sft_pipeline.config.load import find_recipe, load_catalog
from sft_pipeline.definitions import build_definitions
from sft_pipeline.errors import InputError
from sft_pipeline.orchestration.assets import RECIPE_TAG, SET_TAG
from sft_pipeline.orchestration.tags import refuse_code

RECIPE = "access_policy_lora"
PYTHON = '{"name": "mine", "kind": "python", "callable": "os:system"}'


def tagged(*overrides: str) -> None:
    catalog = load_catalog()
    refuse_code(find_recipe(catalog, RECIPE), find_recipe(catalog, RECIPE, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.trust_remote_code=true"],
        ["model={base: data/base_model, trust_remote_code: true}"],
        ["training.epochs=3", "model.trust_remote_code=true"],
        [f"evaluation.graders=[{PYTHON}]", "evaluation.gates=[]", "evaluation.rank_by=[mine]"],
        [
            "evaluation.graders=[{name: s, kind: json_schema, schema: /etc/passwd}]",
            "evaluation.gates=[]",
            "evaluation.rank_by=[s]",
        ],
        ["model.base=/etc"],
        ["model.base=../elsewhere"],
        ["model.base=~/elsewhere"],
        ["model.tokenizer=/tmp/tokenizer"],
        ["template.chat_template=/tmp/evil.jinja"],
        ["template.chat_template=data/../../evil.jinja"],
    ],
)
def test_tags_cannot_set_what_runs_code_or_reads_other_folders(overrides: list[str]) -> None:
    with pytest.raises(InputError, match="tags cannot set"):
        tagged(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["training.learning_rate=1e-3", "training.epochs=1"],
        ["model.base=data/base_model"],
        ["template.chat_template=chatml"],
        ["model.base=owner/name", "model.revision=0123456789abcdef0123456789abcdef01234567"],
        ["evaluation.gates=[]"],
    ],
)
def test_tags_may_set_the_rest(overrides: list[str]) -> None:
    tagged(*overrides)


@pytest.mark.parametrize("what", ["code", "a recipe elsewhere"])
def test_a_run_with_such_tags_fails_before_it_builds(home: Path, tmp_path: Path, what: str) -> None:
    catalog = load_catalog()
    dataset = catalog.recipes[RECIPE].dataset
    tags, said = {SET_TAG: json.dumps(["model.trust_remote_code=true"])}, "model.trust_remote_code"
    if what != "code":
        elsewhere = tmp_path / "r.yaml"
        elsewhere.write_text(f"name: {RECIPE}\nextends: {RECIPE}\ndataset: {dataset}\n")
        tags = {SET_TAG: json.dumps(["training.epochs=1"]), RECIPE_TAG: str(elsewhere)}
        said = "names a file outside the project"
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions(f"{dataset}_snapshots", ["2026-05-20"])
        job = build_definitions(catalog).resolve_job_def(f"{RECIPE}_job")
        result = job.execute_in_process(
            instance=instance,
            partition_key="2026-05-20",
            asset_selection=[dg.AssetKey([RECIPE, "tokenized_rows"])],
            raise_on_error=False,
            tags=tags,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    [failure] = [e for e in result.all_events if e.event_type_value == "STEP_FAILURE"]
    assert said in failure.event_specific_data.error.message
    assert not list((home / "objects").glob("*"))

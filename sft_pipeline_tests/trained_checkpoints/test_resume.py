"""What a resumed run may change: how updates are divided, and nothing else."""

import pytest

from sft_pipeline.config.load import find_recipe, load_catalog
from sft_pipeline.orchestration.assets import stage_asset
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import fingerprint_of
from sft_pipeline.stages.stage import Branch


@pytest.fixture
def branch(home):
    """The embedded recipe with overrides."""
    catalog = load_catalog()

    def of(*overrides: str) -> Branch:
        recipe = find_recipe(catalog, "access_policy_lora", ["training.blocks_per_update=8", *overrides])
        return Branch(catalog.datasets[recipe.dataset], "2026-05-20", recipe)

    return of


def fingerprint(stage, branch):
    return fingerprint_of(STAGES[stage], branch, {})[0]


@pytest.mark.parametrize(
    "overrides,same",
    [
        (["training.processes=2"], {"packed_shards", "sanity_check", "trained_checkpoints"}),
        (["training.gradient_accumulation=2"], {"packed_shards", "sanity_check", "trained_checkpoints"}),
        (["training.per_device_batch=1"], {"packed_shards", "trained_checkpoints"}),
        (
            [
                "training.blocks_per_update=null",
                "training.processes=2",
                "training.gradient_accumulation=2",
                "training.per_device_batch=2",
            ],
            {"packed_shards", "trained_checkpoints"},
        ),
        (["training.blocks_per_update=4"], set()),
        (["training.learning_rate=0.1"], {"packed_shards"}),
    ],
)
def test_the_division_of_an_update_is_no_part_of_the_fingerprint(branch, overrides, same):
    for stage in ("packed_shards", "sanity_check", "trained_checkpoints"):
        equal = fingerprint(stage, branch(*overrides)) == fingerprint(stage, branch())
        assert equal == (stage in same), stage


def test_what_ran_is_in_the_manifest_and_dagster_sees_no_other_code(branch):
    one, two = branch(), branch("training.processes=2")
    stage = STAGES["trained_checkpoints"]
    assert fingerprint_of(stage, two, {})[1]["config"]["training"]["processes"] == 2
    assets = [stage_asset(stage, b.dataset, b.recipe, Reporter()) for b in (one, two)]
    assert len({version for a in assets for version in a.code_versions_by_key.values()}) == 1

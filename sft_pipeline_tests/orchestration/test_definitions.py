"""What Dagster loads: complete, light, and standing when one file is broken."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from sft_pipeline.config.load import load_catalog
from sft_pipeline.definitions import build_definitions
from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.stages.graph import STAGES


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return build_definitions(load_catalog([PACKAGE_DIR]))


def test_they_validate_and_hold_the_branch(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)
    keys = {k.to_user_string() for k in definitions.resolve_asset_graph().get_all_asset_keys()}
    assert keys >= {f"access_policy{'' if s.of_dataset else '_lora'}/{name}" for name, s in STAGES.items()}


def test_every_asset_explains_itself(definitions: dg.Definitions) -> None:
    for spec in definitions.resolve_all_asset_specs():
        assert spec.group_name and spec.owners and spec.code_version and spec.description and spec.kinds, (
            spec.key
        )


def test_every_declared_check_is_there_and_the_costly_ones_block(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    names = {(k.asset_key.path[-1], k.name) for k in graph.asset_check_keys}
    assert names == {(s.name, c.name) for s in STAGES.values() for c in s.checks}
    for stage in STAGES.values():
        assert any(c.blocking for c in stage.checks), stage.name


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "mlflow")


def imported_of(modules: str, *libraries: str) -> str:
    """Which of these libraries a fresh interpreter has loaded after importing modules, as it prints them."""
    code = f"import {modules}, sys; print(sorted(set({libraries!r}) & set(sys.modules)))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_loading_the_code_location_imports_nothing_heavy() -> None:
    assert imported_of("sft_pipeline.definitions", *HEAVY, "bitsandbytes", "matplotlib", "pyarrow") == "[]"


def test_the_command_line_imports_nothing_heavy() -> None:
    assert imported_of("sft_pipeline.cli.main, sft_pipeline.cli.run", *HEAVY, "dagster", "pyarrow") == "[]"


def test_a_broken_file_leaves_the_other_branches_standing(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.yaml").write_text("name: broken\ntraning: {}\n")
    catalog = load_catalog([PACKAGE_DIR, tmp_path])
    assert f"{tmp_path / 'recipes' / 'broken.yaml'}:2" in "".join(catalog.problems.values())
    assert build_definitions(catalog).resolve_job_def("access_policy_lora_job")


def test_model_stages_share_the_gpu_pool(definitions: dg.Definitions) -> None:
    for stage in (s for s in STAGES.values() if s.isolated):
        assets = definitions.resolve_assets_def(dg.AssetKey(["access_policy_lora", stage.name]))
        assert assets.op.pool == "gpu"

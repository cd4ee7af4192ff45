"""No training starts on a failed probe, however it is started."""

import pytest
from transformers import MambaConfig, MambaForCausalLM

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import BlockedError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.sanity_check import build as sanity
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Store
from sft_pipeline_tests.training import tiny


@pytest.fixture
def leaking(home, tmp_path, monkeypatch):
    """A branch whose model cannot keep packed examples apart, with its data in the store."""
    monkeypatch.setattr(
        sanity, "changed_formatting", lambda *_: []
    )  # the tiny rows say nothing of their template
    size = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    tiny.base_folder(tmp_path / "base", model=MambaForCausalLM(MambaConfig(**size)))
    model = {"base": str(tmp_path / "base"), "parameterization": "full"}
    recipe = RecipeConfig(name="r", dataset="d", model=model)
    branch = Branch(DatasetConfig(name="d", sources=[{"path": "rows"}]), "s1", recipe)
    store = Store(home)
    for name, write in (("tokenized_rows", tiny.tokenized_rows), ("packed_shards", tiny.packed_shards)):
        with store.building(name) as folder:
            write(folder)
            (folder / "manifest.json").unlink()
            asset = {"asset": f"r/{name}", "partition": "s1", "code_version": "", "config": {}, "inputs": {}}
            rest = {"accepted": True, "counts": {}, "environment": {}}
            store.set_ref(
                store.commit(folder, volatile=(), fields={**asset, **rest}), run_id=None, current=True
            )
    return branch, store


def test_a_failed_probe_stops_a_run_and_one_that_is_started_downstream_only(leaking):
    branch, store = leaking
    first = run_stage(STAGES["sanity_check"], STAGES, branch, Run(store, Reporter(), run_id="first"))
    assert not first.artifact.manifest.accepted
    built = []

    def isolate(stage, build):
        built.append(stage.name)
        raise AssertionError("the training was started")

    for run_id in ("first", "downstream-only"):
        with pytest.raises(BlockedError, match=r"not accepted.*boundaries.*set packing\.strategy: none"):
            run_stage(
                STAGES["trained_checkpoints"],
                STAGES,
                branch,
                Run(store, Reporter(), run_id=run_id, isolate=isolate),
            )
    assert not built and not list(home_work(store, "checkpoint-*"))


def home_work(store, pattern):
    return (store.home / "work").glob(f"*/{pattern}")

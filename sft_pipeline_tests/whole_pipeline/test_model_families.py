"""Every family of models is exported as what was trained, or refused before the training, in clear words."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.build import build as evaluate
from sft_pipeline.stages.evaluation.config import EvaluationStageConfig
from sft_pipeline.stages.exported_model.build import build as export
from sft_pipeline.stages.exported_model.config import ExportedModelConfig
from sft_pipeline.stages.packed_shards.build import build as pack
from sft_pipeline.stages.packed_shards.config import PackedShardsConfig
from sft_pipeline.stages.sanity_check.build import build as check
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.trained_checkpoints.build import build as train
from sft_pipeline.stages.trained_checkpoints.config import TrainedCheckpointsConfig
from sft_pipeline.store import Artifact, Store
from sft_pipeline.training.base_weights import check_base
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline_tests.evaluation import world as w
from sft_pipeline_tests.training.families import FAMILIES

TRAINING = TrainingConfig(learning_rate=1e-3, max_steps=4, eval_steps=2)
# The models are random and the trials short: what is learned is not the question here.
SANITY = {"overfit_rows": 4, "overfit_steps": 10, "overfit_loss": 0.9999, "short_run_steps": 4, "samples": 1}
GRADERS = [{"name": "format_pass_rate", "kind": "regex", "pattern": "decision"}]
UNPACKED = ("opt", "bloom", "falcon", "gpt-oss-experts", "mamba", "qwen3-next")
REFUSED = {
    ("mamba", "lora"): "incompatible with Mamba-based models",
    ("mamba", "qlora"): "incompatible with Mamba-based models",
    ("llama4-experts", "qlora"): "would replace .*router",
    ("bert-both-ways", "full"): "causal: .*sees the tokens that it is to predict",
    ("bert-both-ways", "lora"): "causal: .*sees the tokens that it is to predict",
    ("bert-both-ways", "qlora"): "causal: .*sees the tokens that it is to predict",
}
EVERY_DAY = {
    ("llama-tied", "qlora"),
    ("gemma2-softcap", "lora"),
    ("qwen3-experts", "full"),
    ("llama4-experts", "lora"),
    ("bert-both-ways", "qlora"),
}
CASES = [
    pytest.param(
        family, how, marks=[] if (family, how) in EVERY_DAY else [pytest.mark.slow], id=f"{family}-{how}"
    )
    for family in FAMILIES
    for how in ("full", "lora", "qlora")
]


@dataclass
class Data:
    """Rows of a small dataset, packed and one to a block."""

    world: w.World
    split: Artifact
    rows: Artifact
    blocks: dict[str, Artifact]
    vocabulary: int


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_PROJECT_ROOT", str(root))
        patch.setenv("SFT_HOME", str(root / "home"))
        world = w.World(root, Store(root / "home"))
        w.write_base(root / "base")
        splits = {"train": w.rows_of(0, 40), "validation": w.rows_of(60, 8), "test": w.rows_of(80, 8)}
        split = w.dataset(world, splits)["grouped_split"]
        rows = w.tokenized(world, split)
        blocks = {}
        for strategy in ("bfd", "none"):
            config = PackedShardsConfig(
                packing={"strategy": strategy}, max_length=96, blocks_per_update=2, epochs=2, seed=1
            )
            built, out = world.build(pack, "packed_shards", config, {"tokenized_rows": rows})
            blocks[strategy] = world.artifact(
                "packed_shards", strategy, out, inputs={"tokenized_rows": rows}, built=built
            )
        vocabulary = json.loads(rows.file("formatting.json").read_text())["vocab_size"]
        yield Data(world, split, rows, blocks, vocabulary)


def refusal(data: Data, family: str, model: ModelConfig) -> str:
    """What `sft check` or the sanity check say against a model; empty where they let it pass."""
    try:
        check_base(model)
        made_with = data.rows.manifest.config
        config = SanityCheckConfig(
            sanity=SANITY,
            model=model,
            training=TRAINING,
            tokenizer="base",
            tokenizer_revision=None,
            template=made_with["template"],
            tokens=made_with["tokens"],
        )
        built, _ = data.world.build(check, "sanity_check", config, inputs(data, family))
    except InputError as error:
        return str(error)
    return "; ".join(
        f"{c.name}: {c.description}" for c in built.checks if not c.passed and c.name != "samples"
    )


@pytest.mark.parametrize("family", UNPACKED)
def test_examples_that_would_see_each_other_in_a_block_are_refused(data, family, monkeypatch):
    base = data.world.root / f"{family}-packed"
    FAMILIES[family](data.vocabulary).save_pretrained(base)
    monkeypatch.setitem(data.blocks, "none", data.blocks["bfd"])
    found = refusal(data, family, ModelConfig(base=base.name, tokenizer="base", parameterization="full"))
    assert found.startswith("boundaries: ") and "set packing.strategy: none" in found


def inputs(data: Data, family: str) -> dict[str, Artifact]:
    return {
        "tokenized_rows": data.rows,
        "packed_shards": data.blocks["none" if family in UNPACKED else "bfd"],
    }


def build(data: Data, function, name: str, config, given: dict[str, Artifact]) -> Artifact:
    """A stage of the branch, whose checks all pass: nothing is refused after the training."""
    built, out = data.world.build(function, name, config, given, Reporter())
    failed = [f"{c.name}: {c.description}" for c in built.checks if not c.passed and c.name != "replies_end"]
    assert not failed, failed
    owner = f"{len(list(data.world.store.objects.iterdir()))}"
    stage = config.model_dump(mode="json")
    return data.world.artifact(name, owner, out, inputs=given, built=built, config=stage)


@pytest.mark.parametrize(("family", "how"), CASES)
def test_a_family_is_exported_as_trained_or_refused_before_the_training(data, family, how):
    if how == "qlora":
        pytest.importorskip("bitsandbytes")
    base = data.world.root / family
    if not base.exists():
        FAMILIES[family](data.vocabulary).save_pretrained(base)
    model = ModelConfig(
        base=family, tokenizer="base", parameterization=how, lora={"r": 4, "alpha": 8, "dropout": 0.0}
    )
    found = refusal(data, family, model)
    if (family, how) in REFUSED:
        assert re.search(REFUSED[family, how], found), found
        return
    assert not found
    given = inputs(data, family)
    shutil.rmtree(data.world.root / "work", ignore_errors=True)
    trained = build(
        data, train, "trained_checkpoints", TrainedCheckpointsConfig(model=model, training=TRAINING), given
    )
    settings = {"graders": GRADERS, "require_improvement": False, "max_new_tokens": 8}
    judged_on = {"tokenized_rows": data.rows, "trained_checkpoints": trained}
    evaluated = build(
        data,
        evaluate,
        "evaluation",
        EvaluationStageConfig.model_validate({"model": model.model_dump(), "evaluation": settings}),
        judged_on,
    )
    exported = build(
        data,
        export,
        "exported_model",
        ExportedModelConfig(export={}, model=model, recipe="recipe", dataset="dataset"),
        {"grouped_split": data.split, **judged_on, "evaluation": evaluated},
    )
    assert_configuration_is_the_bases(base, exported.path / "merged")


def assert_configuration_is_the_bases(base: Path, merged: Path) -> None:
    """No library's choice for its own training is exported."""
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, merged))
    names = ("eos_token_id", "pad_token_id", "dtype", "use_cache", "transformers_version")

    def rest(config):
        return {
            k: rest(v) if isinstance(v, dict) else v
            for k, v in config.items()
            if k not in names and v is not None
        }

    assert rest(after) == rest(before)

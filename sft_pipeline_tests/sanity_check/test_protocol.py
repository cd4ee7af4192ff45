"""The protocol: what it stops, and what it lets pass."""

import json
import random

import pyarrow as pa
import pytest
import torch

from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.sanity_check import build as build_module
from sft_pipeline.stages.sanity_check.asset import STAGE
from sft_pipeline.stages.sanity_check.build import build
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig, SanityConfig
from sft_pipeline.stages.sanity_check.exported_tokenizer import compare_exported_tokenizer
from sft_pipeline.stages.sanity_check.protocol import ShortRun, WorstMicrobatch, instabilities
from sft_pipeline.stages.sanity_check.report import forecast
from sft_pipeline.stages.stage import Build
from sft_pipeline.store import Artifact
from sft_pipeline.tables.schemas import TOKENIZED
from sft_pipeline.text.tokenizer import load_tokenizer
from sft_pipeline.training.config import ModelConfig, TrainingConfig
from sft_pipeline_tests.training import tiny

FULL = {"parameterization": "full"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanity")
    tiny.base_folder(folder / "base")
    tiny.packed_shards(folder / "packed", epochs=8)
    tiny.tokenized_rows(folder / "tokenized")
    return folder


@pytest.fixture(autouse=True)
def _formatting_is_current(request, monkeypatch):
    if "template_changed" not in request.node.name:
        monkeypatch.setattr(build_module, "changed_formatting", lambda *_: [])


def check(
    root,
    out,
    *,
    model=FULL,
    sanity=None,
    training=None,
    packed=None,
    tokenized=None,
    template=None,
    graders=(),
):
    config = SanityCheckConfig(
        sanity=SanityConfig(**{"overfit_rows": 8, "short_run_steps": 8, **(sanity or {})}),
        model=ModelConfig(base=str(root / "base"), **model),
        training=TrainingConfig(**{"learning_rate": 1e-3, **(training or {})}),
        tokenizer=str(root / "base"),
        tokenizer_revision=None,
        template=template or {"chat_template": "tokenizer", "system": None, "variables": {}},
        tokens={
            "max_length": 64,
            "supervise": "completion",
            "overflow": "reject",
            "control_tokens": "reject",
        },
    )
    out.mkdir()
    inputs = {
        "packed_shards": packed or Artifact(root / "packed"),
        "tokenized_rows": tokenized or Artifact(root / "tokenized"),
    }
    built = build(
        Build(
            config=config, inputs=inputs, out=out, work=out.with_name(out.name + "-work"), report=Reporter()
        )
    )
    assert [c.name for c in built.checks] == [s.name for s in STAGE.checks]
    assert (out / "sanity.json").is_file()
    return {c.name: c for c in built.checks}, built


def failed(checks):
    return [name for name, c in checks.items() if not c.passed]


def test_a_sound_recipe_passes_with_its_evidence(root, tmp_path):
    checks, built = check(root, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "sanity.json").read_text())
    replied = any(sample["reply"].strip() for sample in record["samples"])
    assert failed(checks) == ([] if replied else ["samples"])  # a tiny random model may well say nothing
    assert (
        record["passed"]
        and [p["layout"] for p in record["boundaries"]] == ["packed", "rows"]
        and all(p["passed"] for p in record["boundaries"])
    )
    assert record["overfit"]["losses"][-1] <= 0.5 * record["overfit"]["losses"][0]
    assert [s for s, _ in record["short_run"]["val_loss"]] == [0, 4, 8] and len(record["samples"]) == 3
    assert (tmp_path / "out" / "plots" / "short_run.png").is_file() and "forecast" in built.evidence
    assert (tmp_path / "out" / built.evidence["learning_rate_curve"].value).is_file()
    assert checks["boundaries"].evidence["differences"].value


@pytest.mark.parametrize("model", [FULL, {"parameterization": "lora"}])
def test_a_learning_rate_of_one_is_stopped(root, tmp_path, model):
    checks, _ = check(root, tmp_path / "out", model=model, training={"learning_rate": 1.0})
    assert (
        not checks["short_run_stable"].passed
        and "Lower training.learning_rate" in checks["short_run_stable"].description
    )


def test_labels_shifted_by_one_token_are_stopped(root, tmp_path):
    blocks = tiny.pack(tiny.examples(48), 64)
    for block in blocks:
        block["labels"] = [*block["labels"][1:], -100]
    tiny.write_parquet(tmp_path / "packed" / "train" / "part-00000.parquet", blocks, tiny.PACKED)
    tiny.write_parquet(tmp_path / "packed" / "validation" / "part-00000.parquet", blocks[:2], tiny.PACKED)
    checks, _ = check(root, tmp_path / "out", packed=tiny.commit(tmp_path / "packed", "x"))
    assert "shifted by one" in checks["labels_match"].description and failed(checks) == [
        "labels_match",
        "boundaries",
        "causal",
        "overfits",
        "short_run_stable",
        "samples",
        "exportable",
    ]
    assert checks["overfits"].description == "Not run, since an earlier check failed."
    assert checks["labels_match"].evidence["rows"].value[0]["row_id"]


def test_ids_outside_the_vocabulary_and_too_long_examples_are_stopped(root, tmp_path):
    rows = tiny.examples(4, vocabulary=tiny.VOCABULARY + 40)
    rows[0]["input_ids"] = [5] * 300
    rows[0]["labels"], rows[0]["length"] = [-100] * 299 + [5], 300
    tiny.write_parquet(
        tmp_path / "packed" / "train" / "part-00000.parquet", tiny.pack(rows, 512), tiny.PACKED
    )
    checks, _ = check(root, tmp_path / "out", packed=tiny.commit(tmp_path / "packed", "x"))
    message = checks["ids_in_vocabulary"].description
    assert "outside the model's vocabulary of 96" in message
    assert "300 tokens, the model 256 positions" in message


def test_a_template_changed_after_tokenization_is_stopped(root, tmp_path):
    from sft_pipeline.store.files import sha256_json
    from sft_pipeline.text.find_template import load_template
    from sft_pipeline.text.tokenizer import load_tokenizer

    now = load_tokenizer(str(root / "base"), None)
    tokens = {"max_length": 64, "supervise": "completion", "overflow": "reject", "control_tokens": "reject"}
    tokenized = tiny.tokenized_rows(tmp_path / "tokenized")
    path = tokenized.file("formatting.json")
    formatting = json.loads(path.read_text()) | {
        "tokenizer_sha256": now.sha256,
        "template_sha256": load_template("tokenizer", now).sha256,
        "mask_sha256": sha256_json({**tokens, "system": None}),
    }
    path.write_text(json.dumps(formatting))
    assert check(root, tmp_path / "same", tokenized=tokenized)[0]["labels_match"].passed
    other = {"chat_template": "chatml", "system": None, "variables": {}}
    checks, _ = check(root, tmp_path / "other", tokenized=tokenized, template=other)
    assert checks["labels_match"].description == "the template changed after tokenization"


def test_a_model_that_cannot_learn_is_stopped(root, tmp_path):
    checks, _ = check(
        root,
        tmp_path / "out",
        model={"parameterization": "full", "freeze": [r"^model\.(embed|layers)"]},
        sanity={"overfit_steps": 3},
    )
    assert not checks["overfits"].passed and "nothing can be learned" in checks["overfits"].description


def test_skipping_is_accepted_and_recorded(root, tmp_path):
    checks, built = check(root, tmp_path / "out", sanity={"skip": True})
    assert (tmp_path / "out" / built.evidence["learning_rate_curve"].value).is_file()
    assert failed(checks) == [] and all("sanity.skip" in c.description for c in checks.values())
    assert json.loads((tmp_path / "out" / "sanity.json").read_text())["skipped"]


def test_a_leaking_model_stops_before_any_training(root, tmp_path, monkeypatch):
    from transformers import MambaConfig, MambaForCausalLM

    tiny.base_folder(
        tmp_path / "base",
        model=MambaForCausalLM(
            MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=4)
        ),
    )
    for name in ("packed", "tokenized"):
        (tmp_path / name).symlink_to(root / name)
    checks, _ = check(tmp_path, tmp_path / "out")
    assert "set packing.strategy: none" in checks["boundaries"].description and not checks["overfits"].passed
    assert checks["overfits"].description.startswith("Not run")


def _curve(values):
    return list(enumerate(values, 1))


def test_a_short_run_is_stopped_at_divergence_oscillation_and_nan_but_not_at_noise():
    draw = random.Random(1)
    sound = _curve([2.0 * 0.95**i * (1 + 0.3 * (draw.random() - 0.5)) for i in range(20)])
    assert instabilities(sound, [(0, 2.0), (20, 0.8)], 0.01) == []
    assert (
        instabilities(_curve([2.0 + 0.02 * draw.random() for _ in range(20)]), [(0, 2.0), (20, 2.0)], 0.001)
        == []
    )
    assert "validation loss rose" in instabilities(sound, [(0, 2.0), (10, 9.0), (20, 1.9)])[0]
    assert "training loss rose" in instabilities(_curve([2 + 0.3 * i for i in range(20)]), [])[0]
    assert "oscillates" in instabilities(_curve([2.0 if i % 2 else 0.3 for i in range(20)]), [])[0]
    assert instabilities(_curve([2.0, float("nan")]), []) == ["the loss is NaN or infinite"]
    assert "times their size" in instabilities(sound, [], 10.0)[0]
    assert ShortRun(failure="the loss of update 3 is nan").problems() == ["the loss of update 3 is nan"]


def test_the_forecast_scales_the_updates_and_says_how_sure_it_is():
    worst = WorstMicrobatch((0,), 64, 8, memory_mb=1e6, seconds=0.1)
    found = forecast([9.0, 1.0, 1.2, 0.8, 1.0], 1000, worst, trained_parameters=2**20)
    assert found.seconds == pytest.approx(1000) and 150 < found.error < 300 and "17 min" in str(found)
    assert found.memory_mb == 1e6 + 8 and found.memory_error_mb == pytest.approx(0.05 * found.memory_mb)
    assert forecast([], 10, worst, 1) is None


def test_the_memory_trial_takes_the_fullest_blocks_of_the_whole_plan(root, tmp_path):
    blocks = tiny.pack(tiny.examples(48), 64)
    expected = sorted(
        blocks, key=lambda b: (-len(b["input_ids"]), -sum(t != -100 for t in b["labels"]), b["block"])
    )
    check(root, tmp_path / "out", training={"per_device_batch": 2})
    worst = json.loads((tmp_path / "out" / "forecast.json").read_text())["worst_micro_batch"]
    assert worst["blocks"] == [b["block"] for b in expected[:2]]
    assert 0 < worst["supervised"] <= sum(t != -100 for b in expected[:2] for t in b["labels"])
    assert worst["memory_mb"] > 50 and worst["seconds"] > 0


@pytest.mark.shared_data
def test_a_base_whose_architecture_forces_another_tokenizer_is_refused_before_the_training(
    tmp_path, shared_data
):
    """GPT-2 keeps numbers together, and transformers' class for Qwen2 splits them, whatever the files say."""
    gpt2 = shared_data / "tokenizers" / "gpt2"
    tokenizer = load_tokenizer(str(gpt2))
    rows = [tokenizer.ids(f"in {year} it was {year * 37}") for year in range(1900, 1920)]
    examples = [
        {"row_id": str(i), "group": str(i), "input_ids": ids, "labels": ids, "length": len(ids)}
        for i, ids in enumerate(rows)
    ]
    schema = pa.schema([f for f in TOKENIZED if f.name in examples[0]])
    for split in ("train", "validation", "test"):
        tiny.write_parquet(tmp_path / "tokenized" / split / "part-0.parquet", examples, schema)
    artifact = tiny.commit(tmp_path / "tokenized", "tiny/tokenized_rows")
    base = tmp_path / "base"
    base.mkdir()
    found = {}
    for architecture in ("gpt2", "qwen2"):
        (base / "config.json").write_text(json.dumps({"model_type": architecture}))
        config = SanityCheckConfig(
            sanity=SanityConfig(),
            model=ModelConfig(base=str(base), tokenizer=str(gpt2)),
            training=TrainingConfig(),
            tokenizer=str(gpt2),
            tokenizer_revision=None,
            template={"chat_template": "plain", "system": None, "variables": {}},
            tokens={},
        )
        found[architecture] = compare_exported_tokenizer(config, artifact)
    assert found["gpt2"][0] and not found["qwen2"][0]
    assert "model.tokenizer" in found["qwen2"][1] and found["qwen2"][2][0]["training"]


def test_what_would_fail_at_the_end_fails_before_the_training(root, tmp_path, monkeypatch):
    from sft_pipeline.training import export

    lora = {"parameterization": "lora"}
    assert check(root, tmp_path / "sound", model=lora)[0]["exportable"].passed
    monkeypatch.setattr(export, "merge_adapter", lambda model: model.unload())  # the adapter is lost
    checks, _ = check(root, tmp_path / "spoiled", model=lora)
    assert not checks["exportable"].passed
    assert "more than rounding explains" in checks["exportable"].description
    assert not (tmp_path / "spoiled-work" / "export").exists()


def test_a_checkpoint_that_loads_as_another_model_is_stopped(root, tmp_path, monkeypatch):
    from sft_pipeline.stages.sanity_check import export_trial

    save = export_trial.save_weights

    def save_another(model, folder, config):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(3)
        save(model, folder, config)

    monkeypatch.setattr(export_trial, "save_weights", save_another)
    checks, _ = check(root, tmp_path / "out")
    assert failed(checks)[-1] == "exportable"
    assert "not what is trained would be judged" in checks["exportable"].description


def test_an_error_of_a_library_is_the_outcome_of_a_check(root, tmp_path, monkeypatch):
    from sft_pipeline.training import generate

    def fail(*_, **__):
        raise IndexError("no cache for this family")

    monkeypatch.setattr(generate, "generate", fail)
    checks, built = check(root, tmp_path / "out")
    assert failed(checks) == ["samples", "exportable"] and built.counts["checks_failed"] == 2
    assert "IndexError: no cache for this family" in checks["samples"].description

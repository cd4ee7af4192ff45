"""Whole trainings on a tiny model: determinism, resuming, stopping, and what is written down."""

import json
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from sft_pipeline.errors import InputError
from sft_pipeline.store.manifest import data_version, list_files
from sft_pipeline_tests.learning import tiny
from sft_pipeline_tests.trained_checkpoints.run_tiny import Recorder, make, run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    make(folder)
    return folder


def version(root, name, built):
    return data_version(list_files(root / name, built.volatile))


@pytest.fixture(scope="module")
def whole(root):
    """One uninterrupted run of each kind."""
    report = Recorder()
    return {
        "lora": (run(root, "lora", report), report),
        "full": (run(root, "full", parameterization="full", learning_rate=1e-3), None),
    }


CONFIGS = {"lora": {}, "full": {"parameterization": "full", "learning_rate": 1e-3}}


def command(root, name, config, *how, processes=1):
    module = [
        "-m",
        "sft_pipeline_tests.trained_checkpoints.run_tiny",
        str(root),
        name,
        json.dumps(config),
        *map(str, how),
    ]
    start = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
    )
    return subprocess.run([*start, *module], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind,how,number", [("lora", "kill-after-update", 3), ("full", "kill-in-save", 4)])
def test_killed_with_sigkill_and_resumed_the_result_is_bit_identical(root, whole, kind, how, number):
    name = f"killed-{kind}"
    died = command(root, name, CONFIGS[kind], how, number)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    assert not list((root / name).iterdir())
    report = Recorder()
    built = run(root, name, report, **CONFIGS[kind])
    assert any("resuming after update 2" in line for _, line in report.lines)
    assert [step for step, values in report.seen if "loss" in values] == [3, 4, 5, 6]
    assert version(root, name, built) == version(root, kind, whole[kind][0])
    throughput = pq.read_table(root / name / "throughput.parquet").to_pylist()
    assert sorted(r["step"] for r in throughput if r["name"] == "seconds") == [1, 2, 3, 4, 5, 6]


def test_two_trainings_have_the_same_data_version_and_a_finished_one_is_not_repeated(root, whole):
    built, _ = whole["lora"]
    assert version(root, "again", run(root, "again")) == version(root, "lora", built)
    report = Recorder()
    (root / "lora-work").rename(root / "third-work")
    third = run(root, "third", report)
    (root / "third-work").rename(root / "lora-work")
    assert version(root, "third", third) == version(root, "lora", built)
    assert not report.seen


def test_what_is_written_down(root, whole):
    built, report = whole["lora"]
    assert {c.name: c.passed for c in built.checks} == {
        "finite_loss": True,
        "checkpoints_resumable": True,
        "budget_as_planned": True,
        "diagnosis": True,
    }
    training = json.loads((root / "lora" / "training.json").read_text())
    plan = pq.read_table(root / "packed" / "plan.parquet")
    updates = max(plan["update"].to_pylist()) + 1
    assert (
        training["updates"] == {"planned": updates, "done": updates}
        and training["stopped"] == "plan finished"
    )
    assert training["examples"] == 2 * 48 and training["supervised_tokens"] == 2 * 48 * 3
    assert (
        training["layout"] == "rows"
        and training["loss"] == "selected"
        and training["model"]["attention"] == "sdpa"
        and training["model"]["precision"] == "fp32"
    )
    assert [c["step"] for c in training["checkpoints"]] == [2, 4, 6] and training["best"]["step"] == 6
    history = pq.read_table(root / "lora" / "history.parquet").to_pylist()
    assert {r["name"] for r in history} == {
        "loss",
        "val_loss",
        "learning_rate",
        "grad_norm",
        "examples",
        "tokens",
        "supervised_tokens",
    }
    assert [r["step"] for r in history if r["name"] == "val_loss"] == [0, 2, 4, 6]
    live = {name for _, values in report.seen for name in values}
    assert {
        "loss",
        "val_loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "supervised_tokens_per_second",
        "memory_mb",
        "eta_seconds",
    } <= live
    assert [step for step, _ in report.said] == [0, 2, 4, 6] and set(report.said[0][1][0]) == {
        "prompt",
        "reply",
        "expected",
        "finished",
    }
    assert str(root) not in "".join(
        p.read_text()
        for p in (root / "lora").rglob("*.json")
        if "training.json" not in p.name and "adapter_config" not in p.name
    )


def test_checkpoints_load_for_inference_and_their_validation_loss_is_that_of_the_curve(root, whole):
    from sft_pipeline.learning.generate import score_nll
    from sft_pipeline.learning.model import load_for_inference
    from sft_pipeline_tests.trained_checkpoints.run_tiny import config_of

    for kind in ("lora", "full"):
        curve = {
            r["step"]: r["value"]
            for r in pq.read_table(root / kind / "history.parquet").to_pylist()
            if r["name"] == "val_loss"
        }
        rows = [(e["input_ids"], e["labels"]) for e in tiny.examples(12, 1000)]
        for step, checkpoint in ((0, None), (6, root / kind / "checkpoint-6")):
            scores = score_nll(load_for_inference(config_of(root, **CONFIGS[kind]).model, checkpoint), rows)
            assert sum(n for n, _ in scores) / sum(k for _, k in scores) == pytest.approx(
                curve[step], rel=1e-6
            )


def test_evaluation_does_not_change_the_training(root):
    run(root, "often", eval_steps=1, save_steps=6)
    run(root, "seldom", eval_steps=6, save_steps=6)
    a, b = (load_file(root / n / "checkpoint-6" / "adapter_model.safetensors") for n in ("often", "seldom"))
    assert all((a[k] == b[k]).all() for k in a)


def test_a_checkpoint_of_other_data_or_another_template_is_refused_with_the_reason(root, whole, tmp_path):
    import shutil

    shutil.copytree(root / "base", tmp_path / "base")
    tiny.packed_shards(tmp_path / "packed", seed=9)
    tiny.tokenized_rows(tmp_path / "tokenized")
    shutil.copytree(root / "lora-work", tmp_path / "x-work")
    with pytest.raises(InputError, match="data_manifest is not that of the inputs"):
        run(tmp_path, "x")
    shutil.rmtree(tmp_path / "packed")
    tiny.packed_shards(tmp_path / "packed")
    formatting = json.loads((tmp_path / "tokenized" / "formatting.json").read_text())
    (tmp_path / "tokenized" / "formatting.json").write_text(
        json.dumps(formatting | {"template_sha256": "other"})
    )
    with pytest.raises(InputError, match="chat_template_version"):
        run(tmp_path, "x")


def test_nan_stops_the_run_keeps_the_last_good_checkpoint_and_fails_the_check(root, monkeypatch):
    from sft_pipeline.learning.trainer import SupervisedTrainer

    compute = SupervisedTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        nll = compute(self, model, inputs, *args, **kwargs)
        return nll * float("nan") if self.state.global_step == 4 and model.training else nll

    monkeypatch.setattr(SupervisedTrainer, "compute_loss", poisoned)
    built = run(root, "nan")
    checks = {c.name: c for c in built.checks}
    assert (
        not checks["finite_loss"].passed
        and "the loss of update 5 is nan" in checks["finite_loss"].description
    )
    assert checks["checkpoints_resumable"].passed and checks["budget_as_planned"].passed
    assert checks["finite_loss"].evidence["rows"].value[0]["row_id"]
    assert [p.name for p in sorted((root / "nan").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    assert (
        json.loads((root / "nan" / "training.json").read_text())["stopped"] == "the loss of update 5 is nan"
    )


def test_early_stopping_and_max_steps(root):
    built = run(root, "early", early_stopping={"patience": 1, "min_delta": 10.0})
    training = json.loads((root / "early" / "training.json").read_text())
    assert (
        training["updates"]["done"] == 2
        and training["stopped"].startswith("early stopping")
        and all(c.passed for c in built.checks)
    )
    (root / "early").rename(
        root / "early-before"
    )  # as if killed between the last checkpoint and the artifact
    again = run(root, "early", early_stopping={"patience": 1, "min_delta": 10.0})
    assert version(root, "early", again) == version(root, "early-before", built)
    built = run(root, "short", max_steps=3)
    training = json.loads((root / "short" / "training.json").read_text())
    assert training["updates"] == {"planned": 3, "done": 3} and training["stopped"] == "max_steps reached"
    assert (root / "short" / "checkpoint-3" / "bundle.json").is_file() and all(c.passed for c in built.checks)


def test_a_full_disk_while_saving_is_one_message_and_leaves_the_previous_checkpoint(root, monkeypatch):
    import errno

    from sft_pipeline.stages.trained_checkpoints import state

    save = state.save_rng

    def full(states, folder):
        if "checkpoint-4" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(states, folder)

    monkeypatch.setattr(state, "save_rng", full)
    with pytest.raises(InputError, match="no space left on the disk while saving"):
        run(root, "full-disk")
    assert [p.name for p in (root / "full-disk-work").glob("*checkpoint-*")] == ["checkpoint-2"]


def test_dora_rslora_neftune_freezing_and_checkpointing_train(root):
    run(
        root,
        "dora",
        lora={"use_dora": True, "use_rslora": True},
        neftune_alpha=5.0,
        gradient_checkpointing=True,
        max_steps=2,
        schedule="wsd",
        keep_checkpoints=1,
    )
    adapter = json.loads((root / "dora" / "checkpoint-2" / "adapter_config.json").read_text())
    assert adapter["use_dora"] and adapter["use_rslora"]


def test_qlora_trains_and_its_checkpoint_scores_as_in_training(root):
    from sft_pipeline.learning.generate import score_nll
    from sft_pipeline.learning.model import load_for_inference
    from sft_pipeline_tests.trained_checkpoints.run_tiny import config_of

    pytest.importorskip("bitsandbytes")
    run(root, "qlora", parameterization="qlora", max_steps=2)
    training = json.loads((root / "qlora" / "training.json").read_text())
    assert training["model"]["weights_dtype"] == "nf4"
    model = load_for_inference(
        config_of(root, parameterization="qlora").model, root / "qlora" / "checkpoint-2"
    )
    scores = score_nll(model, [(e["input_ids"], e["labels"]) for e in tiny.examples(12, 1000)])
    assert sum(n for n, _ in scores) / sum(k for _, k in scores) == pytest.approx(
        training["checkpoints"][-1]["val_loss"], rel=1e-4
    )


def test_two_processes_train_the_same_updates_with_the_same_loss_curve(root):
    config = {"lora": {"dropout": 0.0}, "processes": 2, "per_device_batch": 2}
    run(root, "one-process", **config)
    ran = command(root, "two-processes", config, processes=2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.strip().splitlines()[-1])
    assert all(told["checks"].values())
    one, two = (
        [(r["step"], r["name"], r["value"]) for r in pq.read_table(root / n / "history.parquet").to_pylist()]
        for n in ("one-process", "two-processes")
    )
    assert [r[:2] for r in one] == [r[:2] for r in two]
    for (_, name, a), (_, _, b) in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=1e-4), name


def test_tensorboard_files_are_kept_where_asked_for(root, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(root / "tb-work" / "tensorboard"))
    built = run(root, "tb", max_steps=2, report_to=["tensorboard"])
    assert list((root / "tb" / "tensorboard").rglob("events.out*")) and "tensorboard/" in built.volatile

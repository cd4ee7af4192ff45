"""Whole trainings on a tiny model: determinism, resuming, stopping, and what is written down."""

import json
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from sft_pipeline.errors import InputError
from sft_pipeline.store.manifest import data_version, list_files
from sft_pipeline.training.schedule import Schedule, learning_rate
from sft_pipeline_tests.trained_checkpoints.run_tiny import (
    Recorder,
    config_of,
    make,
    recording_what_is_trained,
    run,
)
from sft_pipeline_tests.training import tiny


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
    history = pq.read_table(root / "lora" / "history.parquet").to_pylist()
    for name in ("examples", "tokens", "supervised_tokens"):
        values = [r["value"] for r in history if r["name"] == name]
        recorded = training["per_update"][name]
        assert (recorded["min"], recorded["max"]) == (min(values), max(values))
        assert recorded["mean"] == pytest.approx(sum(values) / len(values), abs=0.01) and recorded["cv"] >= 0
    plan = pq.read_table(root / "packed" / "plan.parquet")
    updates = max(plan["update"].to_pylist())
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
    diagnosis = json.loads((root / "lora" / "diagnosis.json").read_text())
    assert diagnosis == {"format": 1, "findings": []} and "diagnosis.json" in built.volatile
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
    assert [step for step, _ in report.sampled] == [0, 2, 4, 6] and set(report.sampled[0][1][0]) == {
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


def test_every_update_is_made_with_the_learning_rate_that_the_recipe_gives_it(root):
    settings = {"learning_rate": 3e-3, "min_learning_rate": 1e-4, "schedule": "linear", "warmup": 0.4}
    run(root, "rates", **settings)
    history = pq.read_table(root / "rates" / "history.parquet").to_pylist()
    config = config_of(root, **settings)
    schedule = Schedule.of(config.training, config.model)
    assert (schedule.peak, schedule.minimum, schedule.warmup) == (3e-3, 1e-4, 0.4)
    expected = [learning_rate(n, 6, schedule) for n in range(6)]
    assert [r["value"] for r in history if r["name"] == "learning_rate"] == pytest.approx(expected)


def test_checkpoints_load_for_inference_and_their_validation_loss_is_that_of_the_curve(root, whole):
    from sft_pipeline.training.generate import score_nll
    from sft_pipeline.training.model import load_for_inference

    for kind in ("lora", "full"):
        curve = {
            r["step"]: r["value"]
            for r in pq.read_table(root / kind / "history.parquet").to_pylist()
            if r["name"] == "val_loss"
        }
        rows = [(e["input_ids"], e["labels"], None) for e in tiny.examples(12, 1000)]
        for step, checkpoint in ((0, None), (6, root / kind / "checkpoint-6")):
            scores = score_nll(load_for_inference(config_of(root, **CONFIGS[kind]).model, checkpoint), rows)
            assert sum(n for n, _ in scores) / sum(k for _, k in scores) == pytest.approx(
                curve[step], rel=1e-6
            )


def test_with_weights_the_validation_loss_is_their_mean_in_training_and_in_evaluation(tmp_path, whole, root):
    from sft_pipeline.training.generate import score_nll
    from sft_pipeline.training.model import load_for_inference

    make(tmp_path, weights=True)
    run(tmp_path, "weighed")
    rows = [(e["input_ids"], e["labels"], e.get("weights")) for e in tiny.weighed(tiny.examples(12, 1000))]
    checkpoint = tmp_path / "weighed" / "checkpoint-6"
    scores = score_nll(load_for_inference(config_of(tmp_path).model, checkpoint), rows)
    recorded = json.loads((tmp_path / "weighed" / "training.json").read_text())["checkpoints"][-1]["val_loss"]
    weight = sum(sum(w) if w else sum(t != -100 for t in labels) for _, labels, w in rows)
    assert sum(w for _, w in scores) == pytest.approx(weight)
    assert sum(n for n, _ in scores) / weight == pytest.approx(recorded, rel=1e-6)
    plain = json.loads((root / "lora" / "training.json").read_text())["checkpoints"][-1]["val_loss"]
    assert abs(plain - recorded) > 1e-4


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
    from sft_pipeline.training.trainer import SupervisedTrainer

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


def test_an_update_that_only_the_evaluation_shows_to_be_bad_is_never_a_checkpoint(root):
    """Its own loss was finite, and no later update meets the weights that it left."""
    built = run(root, "spoiled", learning_rate=1e30, max_steps=1)
    checks = {c.name: c for c in built.checks}
    assert "the validation loss of update 1 is nan" in checks["finite_loss"].description
    assert "the weights are spoiled" in checks["finite_loss"].description
    assert checks["budget_as_planned"].passed and built.counts["updates"] == 1
    assert not list((root / "spoiled").glob("checkpoint-*"))


def test_killed_before_an_old_checkpoint_was_retired_the_result_keeps_no_more_than_asked(root):
    kept = {"keep_checkpoints": 1, "early_stopping": None, "max_steps": 6}
    run(root, "retired", **kept)
    left = sorted(p.name for p in (root / "retired").glob("checkpoint-*"))
    work = root / "retired-again-work"
    (root / "retired-work").rename(work)
    # As if the kill came between the last save and the retirement: an older, whole checkpoint is still there.
    run(root, "older", max_steps=2)
    shutil.copytree(root / "older" / "checkpoint-2", work / "checkpoint-2")
    run(root, "retired-again", **kept)
    assert sorted(p.name for p in (root / "retired-again").glob("checkpoint-*")) == left


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

    from sft_pipeline.training import checkpoint

    save = checkpoint.save_optimizer

    def full(optimizer, model, folder, scaler):
        if "checkpoint-4" in folder.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(optimizer, model, folder, scaler)

    monkeypatch.setattr(checkpoint, "save_optimizer", full)
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
    from sft_pipeline.training.generate import score_nll
    from sft_pipeline.training.model import load_for_inference

    pytest.importorskip("bitsandbytes")
    run(root, "qlora", parameterization="qlora", max_steps=2)
    training = json.loads((root / "qlora" / "training.json").read_text())
    assert training["model"]["weights_dtype"] == "nf4"
    model = load_for_inference(
        config_of(root, parameterization="qlora").model, root / "qlora" / "checkpoint-2", as_trained=True
    )
    scores = score_nll(model, [(e["input_ids"], e["labels"], None) for e in tiny.examples(12, 1000)])
    assert sum(n for n, _ in scores) / sum(k for _, k in scores) == pytest.approx(
        training["checkpoints"][-1]["val_loss"], rel=1e-4
    )


def test_a_killed_qlora_run_is_resumed_bit_identically(root):
    pytest.importorskip("bitsandbytes")
    config = {"parameterization": "qlora", "max_steps": 4}
    built = run(root, "qlora-whole", **config)
    died = command(root, "qlora-killed", config, "kill-after-update", 3)
    assert died.returncode == -signal.SIGKILL, died.stderr[-3000:]
    assert version(root, "qlora-killed", run(root, "qlora-killed", **config)) == version(
        root, "qlora-whole", built
    )


@pytest.mark.slow  # two processes that train half of the updates and are resumed by one are below
def test_two_processes_train_the_same_updates_with_the_same_loss_curve(root):
    config = {"lora": {"dropout": 0.0}, "processes": 2, "per_device_batch": 2}
    run(root, "one-process", **config)
    ran = command(root, "two-processes", config, processes=2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    printed = json.loads(ran.stdout.strip().splitlines()[-1])
    assert all(printed["checks"].values())
    one, two = (
        [(r["step"], r["name"], r["value"]) for r in pq.read_table(root / n / "history.parquet").to_pylist()]
        for n in ("one-process", "two-processes")
    )
    assert [r[:2] for r in one] == [r[:2] for r in two]
    for (_, name, a), (_, _, b) in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=1e-4), name


def trained_rows(folder, processes):
    """{update: ids of the examples trained on, over all ranks}, as one launch left it; each update once per
    rank.
    """
    found = {}
    for rank in range(processes):
        entries = [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]
        assert len({e["update"] for e in entries}) == len(entries), "an update was made twice"
        for entry in entries:
            found.setdefault(entry["update"], []).extend(map(tuple, entry["rows"]))
    return {update: sorted(rows) for update, rows in found.items()}


def planned_rows(root):
    """The same from the plan and the shards."""
    blocks = tiny.pack(tiny.examples(48), 64)
    found = {}
    for entry in pq.read_table(root / "packed" / "plan.parquet").to_pylist():
        ids, at = blocks[entry["block"]]["input_ids"], 0
        for length in blocks[entry["block"]]["seq_lengths"]:
            found.setdefault(entry["update"] - 1, []).append(tuple(ids[at : at + length]))
            at += length
    return {update: sorted(rows) for update, rows in found.items()}


@pytest.mark.parametrize("before,after", [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_killed_and_resumed_with_another_number_of_processes_the_updates_stay_as_planned(root, before, after):
    config = {"lora": {"dropout": 0.0}, "blocks_per_update": 4}
    name = f"from-{before}-to-{after}"
    run(root, f"{name}-whole", **config)
    of = {n: config | {"processes": n, "per_device_batch": 4 // n} for n in (before, after)}
    died = command(root, name, of[before], "kill-after-update", 4, processes=before)
    assert died.returncode != 0 and not list((root / name).iterdir())
    first = trained_rows(root / f"{name}.trained", before)
    (root / f"{name}.trained").rename(root / f"{name}.trained-before")
    if after == 1:
        with recording_what_is_trained(root / f"{name}.trained"):
            checks = {c.name: c.passed for c in run(root, name, **of[after]).checks}
    else:
        ran = command(root, name, of[after], processes=after)
        assert ran.returncode == 0, ran.stderr[-3000:]
        checks = json.loads(ran.stdout.strip().splitlines()[-1])["checks"]
    assert checks and all(checks.values())
    training = json.loads((root / name / "training.json").read_text())
    start = training["divisions"][-1]["from_update"]
    assert training["divisions"] == [
        {"from_update": 1, "processes": before, "per_device_batch": 4 // before},
        {"from_update": start, "processes": after, "per_device_batch": 4 // after},
    ]
    assert start in (3, 5)  # killed after update 4: its checkpoint was written, or the one before it stands
    then, planned = trained_rows(root / f"{name}.trained", after), planned_rows(root)
    kept = {update: rows for update, rows in first.items() if update < start - 1}
    assert kept | then == planned and not kept.keys() & then.keys()
    curves = [
        [(r["step"], r["name"], r["value"]) for r in pq.read_table(root / n / "history.parquet").to_pylist()]
        for n in (f"{name}-whole", name)
    ]
    for (step, curve, a), (other_step, other, b) in zip(*curves, strict=True):
        assert (step, curve) == (other_step, other) and b == pytest.approx(a, abs=1e-4), (step, curve)


def test_a_resume_with_another_micro_batch_or_recipe(root, whole, tmp_path):
    import shutil

    config = {"lora": {"dropout": 0.0}, "blocks_per_update": 4}
    run(root, "micro", **config, max_steps=4)
    shutil.rmtree(root / "micro-work" / "checkpoint-4")
    for name in ("again", "other"):
        shutil.copytree(root / "micro-work", root / f"micro-{name}-work")
    report = Recorder()
    run(root, "micro-again", report, **config, max_steps=4, per_device_batch=1, gradient_accumulation=4)
    assert any(
        level == "warning"
        and "update 3 and those after it are made by 1 process with micro-batches of 1" in line
        for level, line in report.lines
    )
    a, b = (
        load_file(root / n / "checkpoint-4" / "adapter_model.safetensors") for n in ("micro", "micro-again")
    )
    assert all((a[k] - b[k]).norm() <= 1e-4 * a[k].norm() for k in a)
    with pytest.raises(InputError, match=r"another training.learning_rate \(0.005 there, 0.001 here\)"):
        run(root, "micro-other", **config, max_steps=4, learning_rate=1e-3)


def test_tensorboard_files_are_kept_where_asked_for(root, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(root / "tb-work" / "tensorboard"))
    built = run(root, "tb", max_steps=2, report_to=["tensorboard"])
    assert list((root / "tb" / "tensorboard").rglob("events.out*")) and "tensorboard/" in built.volatile

"""A poisoned row spikes; the diagnosis names it, and the command it gives shows which row it was."""

import json
import shlex

import pytest
from typer.testing import CliRunner

from sft_pipeline.cli.main import app
from sft_pipeline.errors import InputError
from sft_pipeline.stages.trained_checkpoints.build import read_data
from sft_pipeline.stages.trained_checkpoints.replay import replay
from sft_pipeline.store import Artifact, Store
from sft_pipeline.store.manifest import InputEntry, Manifest, data_version, list_files
from sft_pipeline_tests.trained_checkpoints.run_tiny import Recorder, config_of, run
from sft_pipeline_tests.training import tiny

FEW = 8  # tokens in the sound rows, so that they are soon learned
FINGERPRINT = "ab12" * 16
SETTINGS = {
    "parameterization": "full",
    "learning_rate": 1e-2,
    "schedule": "constant",
    "eval_steps": 10,
    "lora": {"dropout": 0.0},
    "blocks_per_update": 2,
}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A training in a store, one row of whose update 41 is nonsense: (root, block, row_id, findings)."""
    root = tmp_path_factory.mktemp("poisoned")
    blocks = tiny.pack(tiny.examples(400, vocabulary=FEW), 64)
    block = next(r["block"] for r in tiny.plan(len(blocks), 2, 1) if r["update"] == 41)
    tiny.base_folder(root / "base")
    tiny.packed_shards(
        root / "objects" / "packed", rows=400, per_update=2, epochs=1, vocabulary=FEW, poisoned=block
    )
    tiny.tokenized_rows(root / "objects" / "tokenized")
    for name in ("packed", "tokenized"):
        (root / name).symlink_to(root / "objects" / name)
    run(root, FINGERPRINT, **SETTINGS)
    (root / FINGERPRINT).rename(root / "objects" / FINGERPRINT)
    folder = root / "objects" / FINGERPRINT
    files = list_files(folder, ())
    inputs = {
        f"{name}{rest}": InputEntry(
            asset=f"tiny/{name}{rest}", partition="test", fingerprint=name, data_version="", role="data"
        )
        for name, rest in (("packed", "_shards"), ("tokenized", "_rows"))
    }
    manifest = Manifest(
        asset="tiny/trained_checkpoints",
        partition="test",
        fingerprint=FINGERPRINT,
        data_version=data_version(files),
        code_version="test",
        config=config_of(root, **SETTINGS).model_dump(mode="json"),
        inputs=inputs,
        accepted=True,
        counts={},
        files=files,
        environment={},
        created_at="2026-01-01T00:00:00Z",
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return (
        root,
        block,
        blocks[block]["row_ids"][0],
        json.loads((folder / "diagnosis.json").read_text())["findings"],
    )


def test_the_spike_is_named_and_its_command_shows_the_poisoned_row_first(poisoned, monkeypatch):
    root, block, row_id, findings = poisoned
    [spike] = [f for f in findings if f["kind"] == "spike"]
    assert spike["step"] == 41 and block in spike["blocks"] and row_id in spike["row_ids"]
    assert spike["replay"] in spike["words"]
    monkeypatch.setenv("SFT_HOME", str(root))
    command, *arguments = shlex.split(spike["replay"].replace(FINGERPRINT[:12], FINGERPRINT[:7]))
    assert command == "sft"
    ran = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    worst, second = found["rows"][:2]
    assert (worst["row_id"], worst["block"]) == (row_id, block) and worst["loss"] > second["loss"] + 1
    assert found["checkpoint"] == 40
    assert found["loss"] == found["recorded_loss"] and found["grad_norm"] == pytest.approx(
        found["recorded_grad_norm"]
    )
    total = sum(r["loss"] * r["supervised"] for r in found["rows"])
    assert total / sum(r["supervised"] for r in found["rows"]) == pytest.approx(found["loss"], rel=1e-5)
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert row_id in shown.stdout and "gradient norm" in shown.stdout


@pytest.mark.parametrize("update,checkpoint", [(1, 0), (10, 0), (11, 10)])
def test_any_update_comes_out_as_it_was(poisoned, tmp_path, update, checkpoint):
    root = poisoned[0]
    data = read_data(Artifact(root / "packed"), Artifact(root / "tokenized"))
    training = Store(root).get(FINGERPRINT).path
    found = replay(config_of(root, **SETTINGS), data, training, update, tmp_path, Recorder())
    assert found.checkpoint == checkpoint and found.loss == found.recorded_loss


def test_an_unknown_training_or_update_is_one_clear_message(poisoned, tmp_path, monkeypatch):
    root = poisoned[0]
    monkeypatch.setenv("SFT_HOME", str(root))
    for arguments, words in (
        (["nothing", "--update", "1"], "no finished training"),
        (
            [str(root / "objects" / FINGERPRINT / "checkpoint-10"), "--update", "999"],
            "there is no update 999",
        ),
    ):
        with pytest.raises(InputError, match=words):
            CliRunner().invoke(app, ["replay", *arguments], catch_exceptions=False)

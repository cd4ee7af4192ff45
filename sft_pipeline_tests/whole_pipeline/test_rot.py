"""A flipped bit in what a trained branch is made of, its size and times kept, reaches no new artifact."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_pipeline.cli.branch import find_branch
from sft_pipeline.errors import InputError
from sft_pipeline.project import set_environment
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.stage import Built
from sft_pipeline.store import Store
from sft_pipeline_tests.branches import Finished
from sft_pipeline_tests.command import ROOT
from sft_pipeline_tests.store.test_rot import flipped

FLIPS = 15  # of each kind of artifact
READ_BY = {
    "tokenized_rows": "sanity_check",
    "packed_shards": "trained_checkpoints",
    "trained_checkpoints": "evaluation",
    "evaluation": "exported_model",
}


class Reached(Exception):
    """The build was about to begin."""


def begin(*_: Any) -> Built:
    raise Reached


@pytest.mark.parametrize("kind", READ_BY)
def test_no_flipped_bit_reaches_what_is_trained_judged_or_shipped(
    finished: Finished, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    for name in ("objects", "refs"):
        shutil.copytree(finished.home / name, home / name)
    monkeypatch.setenv("SFT_HOME", str(home))
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(ROOT))
    if finished.config:
        monkeypatch.setenv("SFT_CONFIG_PATH", str(finished.config))
    set_environment()
    store = Store(home)
    _, branch = find_branch(finished.recipe, finished.snapshot, [], Console(quiet=True))
    consumer = STAGES[READ_BY[kind]]
    read = store.resolve(STAGES[kind].asset(branch), branch.snapshot)
    made = store.resolve(consumer.asset(branch), branch.snapshot)
    assert read and made
    shutil.rmtree(made.path)

    def build() -> None:
        run_stage(consumer, STAGES, branch, Run(store, Reporter(), isolate=begin))

    with pytest.raises(Reached):  # whole, it is read
        build()
    draw = random.Random(kind)
    files = [read.file(entry.path) for entry in read.manifest.files if entry.bytes]
    for number in range(FLIPS):
        path = read.file("manifest.json") if number % 5 == 0 else draw.choice(files)
        with flipped(path, draw.randrange(8 * path.stat().st_size)), pytest.raises(InputError):
            build()

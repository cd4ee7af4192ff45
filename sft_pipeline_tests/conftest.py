"""What every test may use: a store of its own, the real data where it is at hand, and finished branches."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow every test on a busy machine
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores already

from sft_pipeline_tests.branches import Finished, finish_demo, finish_small
from sft_pipeline_tests.command import OF_THE_CALLER, ROOT

# The costliest modules first, so that no worker begins one when the other has nothing left to do.
COSTLY_FIRST = (
    "whole_pipeline/test_branch.py",
    "trained_checkpoints/test_training.py",
    "whole_pipeline/test_model_families.py",
    "whole_pipeline/test_gsm8k.py",
    "whole_pipeline/test_kills.py",
    "training/test_loss.py",
    "launch/",
    "sweep/test_sweep.py",
    "config/test_every_key.py",
    "tokenized_rows/test_columns.py",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Under xdist the tests of a module, and those of a finished branch, share a worker and its fixtures.

    Not in `pytest_collection_modifyitems`: xdist reads the groups in its own, which may come first.
    """
    group = item.nodeid.split("::")[0]
    if "finished" in getattr(item, "fixturenames", ()):
        name = item.callspec.params["finished"]  # type: ignore[attr-defined]
        group = f"finished {name}"
        if name == "demo":
            item.add_marker(pytest.mark.timeout(1500))  # the first of its tests waits for 484 updates
    item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Costly modules first."""

    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(COSTLY_FIRST) if name in item.nodeid), len(COSTLY_FIRST))

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public datasets, tokenizers and a small model, kept beside the checkout; tests skip without them."""
    folder = Path(os.environ.get("SFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the shared datasets are not on this machine")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh SFT_HOME for this test, with Dagster's and MLflow's storage in it."""
    from sft_pipeline.project import set_environment

    folder = tmp_path / "sft_home"
    for name in OF_THE_CALLER:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SFT_HOME", str(folder))
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(ROOT))
    set_environment()
    yield folder


@pytest.fixture(scope="session", params=["small", pytest.param("demo", marks=pytest.mark.slow)])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A branch from raw rows to an exported model, made once by `sft run` for all tests that look at one.

    Every day it is that of a small dataset; `make test-all` has the embedded default too.
    """
    folder = tmp_path_factory.mktemp(request.param)
    return finish_small(folder) if request.param == "small" else finish_demo(folder)

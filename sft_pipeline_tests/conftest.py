"""What every test may use: a store of its own, the real data where it is at hand, and a Dagster instance on sqlite."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_pipeline_tests.command import ROOT, Ran, sft

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow every test on a busy machine


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public datasets, tokenizers and a small model kept beside the checkout; tests that need them skip without."""
    folder = Path(os.environ.get("SFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the shared datasets are not on this machine")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh SFT_HOME for this test, with Dagster's and MLflow's storage in it."""
    from sft_pipeline.project import set_environment

    folder = tmp_path / "sft_home"
    for name in (
        "SFT_HOME",
        "SFT_PROJECT_ROOT",
        "DAGSTER_HOME",
        "SFT_DAGSTER_DIR",
        "MLFLOW_TRACKING_URI",
        "SFT_CONFIG_PATH",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SFT_HOME", str(folder))
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(ROOT))
    set_environment()
    yield folder


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="session")
def demo(demo_home: Path) -> Ran:
    """The embedded default, run once for all tests that look at it."""
    ran = sft("run", "access_policy_lora", "--json", home=demo_home)
    assert ran.code == 0, ran.stderr[-4000:]
    return ran

"""Runs a dataset's stages in process against a store of the test's own."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.grouped_split.asset import STAGE as GROUPED_SPLIT
from sft_pipeline.stages.raw_rows.asset import STAGE as RAW_ROWS
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.stages.run import Run, StageOutcome, run_stage
from sft_pipeline.stages.stage import Branch, Stage
from sft_pipeline.stages.validated_rows.asset import STAGE as VALIDATED_ROWS
from sft_pipeline.store import Artifact, Store
from sft_pipeline.tables import parquet

STAGES = {s.name: s for s in (RAW_ROWS, VALIDATED_ROWS, GROUPED_SPLIT)}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def dataset(*sources: dict[str, Any] | Path, **rest: Any) -> DatasetConfig:
    """A dataset of static sources; a path alone is a source."""
    configs = [
        {"path": str(s), "static": True} if isinstance(s, Path) else {"static": True, **s} for s in sources
    ]
    return DatasetConfig.model_validate({"name": "rows", "sources": configs, **rest})


def run(
    config: DatasetConfig, home: Path, until: Stage = GROUPED_SPLIT, snapshot: str | None = None
) -> dict[str, StageOutcome]:
    """Builds the dataset's stages up to `until`. An unaccepted one raises BlockedError in the next."""
    branch = Branch(config, snapshot or snapshots(config.sources)[-1])
    outcomes = {}
    for stage in STAGES.values():
        outcomes[stage.name] = run_stage(stage, STAGES, branch, Run(Store(home), Reporter()))
        if stage is until:
            break
    return outcomes


def rows(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    """The rows of a folder of parts, or of one file."""
    path = artifact.file(name)
    return list(parquet.read_rows(artifact.parts(name) if path.is_dir() else [path]))


def check(outcome: StageOutcome, name: str) -> dict[str, Any]:
    return next(c for c in outcome.artifact.manifest.checks if c["name"] == name)


@pytest.fixture
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder for the test's data; `home` is the store beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setenv("SFT_PROJECT_ROOT", str(folder))
    return folder

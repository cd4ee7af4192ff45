"""A flipped bit in an artifact, its size and times kept, reaches no new artifact."""

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.packed_shards.asset import STAGE as PACKED_SHARDS
from sft_pipeline.stages.run import Run, run_stage
from sft_pipeline.stages.stage import Branch
from sft_pipeline.stages.tokenized_rows.asset import STAGE as TOKENIZED_ROWS
from sft_pipeline.store import Artifact, Store
from sft_pipeline_tests import dataset_runs
from sft_pipeline_tests.text.tiny import CHATML, save_tokenizer

STAGES = {**dataset_runs.STAGES, TOKENIZED_ROWS.name: TOKENIZED_ROWS, PACKED_SHARDS.name: PACKED_SHARDS}
FLIPS = 60  # of each kind of artifact


class Recorded(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str, level: str = "info") -> None:
        self.lines.append(message)


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"who may read report {i}", "completion": f"user {i}"} for i in range(count)]


class Project:
    """A dataset with a recipe, built in a store of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.store, self.report = root, Store(root / "home"), Recorded()
        save_tokenizer(root / "tokenizer", CHATML)

    def branch(self, count: int) -> Branch:
        source = dataset_runs.write_jsonl(self.root / "rows.jsonl", rows(count))
        split = {"validation": 0.2, "test": 0.2, "near_duplicates": None}
        dataset = dataset_runs.dataset({"path": str(source), "format": "prompt_completion"}, split=split)
        recipe = {"name": "r", "dataset": "rows", "model": {"base": str(self.root / "tokenizer")}}
        snapshot = dataset_runs.snapshots(dataset.sources)[-1]
        return Branch(dataset, snapshot, RecipeConfig.model_validate(recipe))

    def build(self, branch: Branch, *names: str) -> dict[str, Artifact]:
        run = Run(self.store, self.report)
        return {name: run_stage(STAGES[name], STAGES, branch, run).artifact for name in names}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("rot"))


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of a file turned over, its times kept; turned back at the end."""
    status, data = path.stat(), bytearray(path.read_bytes())
    for turn in range(2):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if turn == 0:
            yield


@pytest.mark.parametrize(
    ("kind", "consumer"),
    [
        ("raw_rows", "validated_rows"),
        ("validated_rows", "grouped_split"),
        ("grouped_split", "tokenized_rows"),
        ("tokenized_rows", "packed_shards"),
    ],
)
def test_no_flipped_bit_of_an_input_reaches_what_is_built_from_it(
    project: Project, kind: str, consumer: str
) -> None:
    branch = project.branch(60)
    order = [*STAGES][: [*STAGES].index(consumer)]
    built = project.build(branch, *order)[kind]
    draw = random.Random(kind)
    files = [built.file(entry.path) for entry in built.manifest.files if entry.bytes]
    manifest = built.file("manifest.json")
    for number in range(FLIPS):
        path = manifest if number % 10 == 0 else draw.choice(files)
        with flipped(path, draw.randrange(8 * path.stat().st_size)):
            before = {*project.store.objects.iterdir()}
            with pytest.raises(InputError):
                project.build(branch, consumer)
            assert {*project.store.objects.iterdir()} == before
    assert project.build(branch, consumer)[consumer].manifest.accepted
    shutil.rmtree(project.store.objects)


def test_rows_are_not_taken_over_from_a_damaged_artifact(project: Project) -> None:
    branch = project.branch(60)
    first = project.build(branch, *[*STAGES][:4])["tokenized_rows"]
    draw = random.Random(0)
    parts = [*first.parts("train"), first.file("outcomes.parquet")]
    versions = set()
    for number in range(5):
        grown = project.branch(61 + number)
        project.report.lines.clear()
        path = parts[number % len(parts)]
        with flipped(path, draw.randrange(8 * path.stat().st_size)):
            built = project.build(grown, *[*STAGES][:4])["tokenized_rows"]
        assert built.manifest.counts["rows_reused"] == 0 and built.manifest.reused_from == []
        assert any("damaged artifact" in line and path.name in line for line in project.report.lines)
        versions.add(built.manifest.data_version)
        shutil.rmtree(built.path)
    again = project.build(project.branch(61), *[*STAGES][:4])["tokenized_rows"]
    assert again.manifest.counts["rows_reused"] == 60
    assert [r.fingerprint for r in again.manifest.reused_from] == [first.manifest.fingerprint]
    assert again.manifest.data_version in versions


def test_an_unreadable_manifest_of_another_artifact_stops_nothing(project: Project) -> None:
    branch = project.branch(40)
    stray = project.store.objects / ("0" * 64)
    stray.mkdir(parents=True, exist_ok=True)
    (stray / "manifest.json").write_text("{]")
    assert project.build(branch, *[*STAGES][:5])["packed_shards"].manifest.accepted

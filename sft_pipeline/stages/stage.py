"""What a stage is: its name, what it reads, the plain function that builds it, and the checks that judge it.

Nothing here knows Dagster or MLflow. `run.py` runs a stage against the store, and `orchestration/assets.py`
makes a Dagster asset of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_pipeline.config.base import Config
from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.reporting import Reporter
from sft_pipeline.store import Artifact


@dataclass(frozen=True)
class Branch:
    """One dataset snapshot, and the recipe that is run on it (None for the dataset's own stages)."""

    dataset: DatasetConfig
    snapshot: str
    recipe: RecipeConfig | None = None

    def require_recipe(self) -> RecipeConfig:
        if self.recipe is None:
            raise AssertionError("a dataset stage does not read a recipe")
        return self.recipe


@dataclass(frozen=True)
class Evidence:
    """Something people look at: in the Dagster UI, in MLflow, in a report.

    kind "number" (int or float), "text", "markdown", "table" (list of flat dicts with the same keys),
    "schema" (dict column -> type), "plot" (path of a PNG relative to the artifact), "path", "url".
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class Check:
    """The outcome of one of the checks that a stage declares, with its evidence."""

    name: str
    passed: bool
    description: str
    evidence: Mapping[str, Evidence] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckSpec:
    """A check that a stage always reports."""

    name: str
    blocking: bool
    description: str


@dataclass(frozen=True)
class Build:
    """What a stage's build function is given.

    Attributes:
        config: The stage's own configuration.
        inputs: Upstream artifacts by stage name.
        out: An empty folder; what is written here becomes the artifact.
        work: A folder of this fingerprint that survives a kill, for resumable work. Made on demand.
        report: Where to log, and where progress goes.
        earlier: Artifacts of this stage with the same code, configuration, outside files and package
            versions, the newest first; only for a stage that `reuses_rows`.
        outside: The digests of outside files that the artifact will record, {what: sha256}; not passed on to
            a child process.
    """

    config: Any
    inputs: Mapping[str, Artifact]
    out: Path
    work: Path
    report: Reporter
    snapshot: str = ""
    asset: str = ""
    earlier: tuple[Artifact, ...] = ()
    outside: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What a build function returns.

    Attributes:
        counts: Whole numbers for the manifest (rows read, accepted, ...).
        checks: One outcome for each declared check.
        volatile: Paths (folders end in "/") that may differ between equal builds.
        reused_from: Earlier artifacts from which rows were taken over.
        evidence: Numbers, tables and plots for people.
    """

    counts: Mapping[str, int]
    checks: tuple[Check, ...] = ()
    volatile: tuple[str, ...] = ()
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    reused_from: tuple[Artifact, ...] = ()


BuildFunction = Callable[[Build], Built]


def _nothing(_: Branch) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Stage:
    """A stage as its package declares it in `asset.py`.

    Attributes:
        name: The asset's short name, which is also the package's.
        inputs: Names of the stages whose artifacts are read. Their data versions go into the fingerprint.
        acceptance: Names of stages that must have accepted this very input and configuration; nothing else is
            read of them.
        config: From a branch, only what this stage reads. Its `identity()` goes into the fingerprint.
        load_build: Imports the plain build function: only when a stage runs, so that declaring it is light. A
            child process finds this function by its module and name.
        checks: The checks that `build` reports.
        outside: From a branch, {what: sha256} for every file read from outside the store.
        packages: Distributions whose version shapes the output.
        isolated: Runs in a supervised child process: it loads a model.
        reuses_rows: Its build may take rows over from earlier artifacts instead of making them again.
        reuse_unaccepted: False: a result that was not accepted is never reused.
        of_dataset: Belongs to the dataset and reads no recipe.
        package: The package under `stages` whose code it is made of; where empty, the one of its name.
    """

    name: str
    description: str
    kinds: frozenset[str]
    inputs: tuple[str, ...]
    config: Callable[[Branch], Config]
    load_build: Callable[[], BuildFunction]
    checks: tuple[CheckSpec, ...]
    acceptance: tuple[str, ...] = ()
    outside: Callable[[Branch], dict[str, str]] = _nothing
    packages: tuple[str, ...] = ()
    isolated: bool = False
    reuses_rows: bool = False
    reuse_unaccepted: bool = True
    of_dataset: bool = False
    package: str = ""

    @property
    def code_package(self) -> str:
        return self.package or self.name

    def asset(self, branch: Branch) -> str:
        """The asset key, for example `access_policy_lora/packed_shards`."""
        owner = branch.dataset.name if self.of_dataset else branch.require_recipe().name
        return f"{owner}/{self.name}"


def number(value: float) -> Evidence:
    return Evidence("number", value)


def text(value: str) -> Evidence:
    return Evidence("text", value)


def markdown(value: str) -> Evidence:
    return Evidence("markdown", value)


def table(rows: list[dict[str, Any]]) -> Evidence:
    return Evidence("table", rows)


def plot(path: str) -> Evidence:
    return Evidence("plot", path)

"""Runs one stage against the store: fingerprint, reuse, build, commit, refs. The only way an artifact is made."""

import importlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.project import PACKAGE_DIR
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.code_version import code_version
from sft_pipeline.stages.stage import Branch, Build, Built, Evidence, Stage
from sft_pipeline.store import Artifact, InputEntry, Store
from sft_pipeline.store.files import clear_disk_errors, sha256_json, write_json

REPORT = "report.json"
Isolate = Callable[[Stage, Build], Built]


@dataclass(frozen=True)
class Tracked:
    """What an experiment tracker gives to one build.

    Attributes:
        run_id: The tracking run, recorded in the manifest.
        report: Who listens to the build.
        evidence: Added to the artifact's evidence, for example a link to the tracking run.
        committed: Told the finished artifact.
    """

    run_id: str | None
    report: Reporter
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    committed: Callable[[Artifact], None] = lambda artifact: None


class Tracker(Protocol):
    """Opens a tracking run around the building of a stage; what is reused is not tracked again."""

    def __call__(
        self, stage: Stage, branch: Branch, fingerprint: str, inputs: Mapping[str, Artifact], report: Reporter
    ) -> AbstractContextManager[Tracked]: ...


def untracked(
    stage: Stage, branch: Branch, fingerprint: str, inputs: Mapping[str, Artifact], report: Reporter
) -> AbstractContextManager[Tracked]:
    """A tracker that keeps no record."""
    return nullcontext(Tracked(None, report))


@dataclass(frozen=True)
class Run:
    """Where and for whom stages run.

    Attributes:
        run_id: The Dagster run; names what its steps make, so that later steps read exactly that.
        earlier_run_ids: The runs this one retries: what they made is read too.
        current: Whether refs move. False for a run with overrides (`--set`).
        tracker: Opens a tracking run around each build.
        isolate: Runs an isolated stage's build in a child process; None runs it here.
    """

    store: Store
    report: Reporter
    run_id: str | None = None
    earlier_run_ids: tuple[str, ...] = ()
    current: bool = True
    tracker: Tracker = untracked
    isolate: Isolate | None = None


@dataclass(frozen=True)
class Outcome:
    """An artifact, and whether it was there already."""

    artifact: Artifact
    cached: bool

    @property
    def evidence(self) -> dict[str, Evidence]:
        return read_report(self.artifact)["evidence"]


@dataclass(frozen=True)
class Inputs:
    """Upstream artifacts by stage name: those that are read, and those that must only have accepted."""

    data: Mapping[str, Artifact]
    acceptance: Mapping[str, Artifact]

    def entries(self) -> dict[str, InputEntry]:
        return {n: a.as_input() for n, a in self.data.items()} | {
            n: a.as_input("acceptance") for n, a in self.acceptance.items()
        }


def run_stage(stage: Stage, stages: Mapping[str, Stage], branch: Branch, run: Run) -> Outcome:
    """Brings one asset up to date.

    Args:
        stages: All stages by name, to find the inputs' owners.

    Raises:
        BlockedError: An input is missing its acceptance.
        InputError: An input is not built, damaged, or the stage's own input is bad.
    """
    asset = stage.asset(branch)
    run.report.stage(asset, "started")
    try:
        outcome = _bring_up_to_date(stage, stages, branch, run)
    except BaseException:
        run.report.stage(asset, "failed")
        raise
    run.report.stage(
        asset,
        ("cached" if outcome.cached else "built") if outcome.artifact.manifest.accepted else "not accepted",
    )
    return outcome


def needed_for(last: str, stages: Mapping[str, Stage]) -> list[str]:
    """A stage and its ancestors, in graph order."""
    wanted = {last}
    for name in reversed(list(stages)):
        if name in wanted:
            wanted.update(stages[name].inputs, stages[name].acceptance)
    return [name for name in stages if name in wanted]


def _bring_up_to_date(stage: Stage, stages: Mapping[str, Stage], branch: Branch, run: Run) -> Outcome:
    inputs = resolve_inputs(stage, stages, branch, run)
    fingerprint, parts = fingerprint_of(stage, branch, inputs.data)
    artifact = _reusable(stage, run, fingerprint)
    cached = artifact is not None
    if artifact is None:
        with run.store.building(
            fingerprint,
            lambda: run.report.log(f"{stage.asset(branch)}: another process is building it; waiting"),
        ) as out:
            artifact = _reusable(
                stage, run, fingerprint
            )  # somebody else may have built it while this one waited
            cached = artifact is not None
            if artifact is None:
                artifact = _build(stage, branch, run, inputs, fingerprint, parts, out)
    run.store.set_ref(artifact, run_id=run.run_id, current=run.current)
    return Outcome(artifact, cached)


def resolve_inputs(stage: Stage, stages: Mapping[str, Stage], branch: Branch, run: Run) -> Inputs:
    """The artifacts that the stage reads: this run's own, else the current ones; each must be intact and accepted."""
    found = {}
    for name in (*stage.inputs, *stage.acceptance):
        asset = stages[name].asset(branch)
        artifact = run.store.resolve(
            asset, branch.snapshot, (*([run.run_id] if run.run_id else []), *run.earlier_run_ids)
        )
        if artifact is None:
            raise InputError(
                f"{stage.asset(branch)} reads {asset}, which is not built for snapshot {branch.snapshot}: materialize it first"
            )
        artifact.verify()
        if not artifact.manifest.accepted:
            failed = [
                f"{c['name']} ({c['description']})"
                for c in artifact.manifest.checks
                if c["blocking"] and not c["passed"]
            ]
            raise BlockedError(
                f"{stage.asset(branch)} refuses its input: {asset} of snapshot {branch.snapshot} is not accepted. Failed: {'; '.join(failed)}"
            )
        found[name] = artifact
    inputs = Inputs({n: found[n] for n in stage.inputs}, {n: found[n] for n in stage.acceptance})
    for name, artifact in inputs.acceptance.items():
        _must_be_about(stage, stages[name], stages, branch, run, artifact)
    return inputs


def _must_be_about(
    stage: Stage, gate: Stage, stages: Mapping[str, Stage], branch: Branch, run: Run, artifact: Artifact
) -> None:
    """An acceptance counts only for the very inputs and configuration it was given for."""
    expected, _ = fingerprint_of(gate, branch, resolve_inputs(gate, stages, branch, run).data)
    if artifact.manifest.fingerprint != expected:
        raise BlockedError(
            f"{stage.asset(branch)} refuses: {gate.asset(branch)} was made for other inputs or another configuration of this recipe. Materialize it again first"
        )


def fingerprint_of(
    stage: Stage, branch: Branch, inputs: Mapping[str, Artifact]
) -> tuple[str, dict[str, Any]]:
    """The fingerprint of what the stage would build, and the parts it is made of; `config` there is the whole one."""
    config = stage.config(branch)
    parts: dict[str, Any] = {
        "asset": stage.asset(branch),
        "partition": branch.snapshot,
        "code_version": code_version(stage.room or stage.name),
        "config": config.model_dump(mode="json", by_alias=True),
        "inputs": {name: artifact.manifest.data_version for name, artifact in inputs.items()},
        "outside": stage.outside(branch),
        "packages": {name: _version(name) for name in stage.packages},
    }
    return sha256_json(parts | {"config": config.identity()}), parts


def _reusable(stage: Stage, run: Run, fingerprint: str) -> Artifact | None:
    artifact = run.store.get(fingerprint)
    if artifact is None or not (stage.reuse_unaccepted or artifact.manifest.accepted):
        return None
    artifact.verify()
    return artifact


def _build(
    stage: Stage, branch: Branch, run: Run, inputs: Inputs, fingerprint: str, parts: dict[str, Any], out: Any
) -> Artifact:
    asset = stage.asset(branch)
    with (
        clear_disk_errors(f"building {asset}"),
        run.tracker(stage, branch, fingerprint, inputs.data, run.report) as tracked,
    ):
        build = Build(
            config=stage.config(branch),
            inputs=inputs.data,
            out=out,
            work=run.store.work(fingerprint),
            report=tracked.report,
            snapshot=branch.snapshot,
            asset=asset,
            earlier=earlier_builds(stage, run.store, branch) if stage.reuses_rows else (),
        )
        built = run.isolate(stage, build) if stage.isolated and run.isolate else load_build(stage)(build)
        checks = [
            {
                "name": spec.name,
                "blocking": spec.blocking,
                "passed": bool(check.passed),
                "description": check.description,
            }
            for spec, check in _pair_checks(stage, built)
        ]
        write_report(out, replace(built, evidence={**built.evidence, **tracked.evidence}))
        artifact = run.store.commit(
            out,
            volatile=(*built.volatile, REPORT),
            fill=lambda _: {
                "asset": asset,
                "partition": branch.snapshot,
                "code_version": parts["code_version"],
                "config": parts["config"],
                "outside": parts["outside"],
                "packages": parts["packages"],
                "inputs": inputs.entries(),
                "accepted": all(c["passed"] for c in checks if c["blocking"]),
                "counts": dict(built.counts),
                "checks": checks,
                "environment": environment(),
                "dagster_run_id": run.run_id,
                "mlflow_run_id": tracked.run_id,
            },
        )
        tracked.committed(artifact)
        return artifact


EARLIER = 3
_SAME = ("code_version", "config", "outside", "packages")


def earlier_builds(stage: Stage, store: Store, branch: Branch) -> tuple[Artifact, ...]:
    """The newest intact artifacts of a stage that differ in their inputs only."""
    _, parts = fingerprint_of(stage, branch, {})
    found = []
    for artifact in reversed(store.all()):
        manifest = artifact.manifest
        of_stage = manifest.asset.endswith(f"/{stage.name}")
        if (
            of_stage
            and all(getattr(manifest, k) == parts[k] for k in _SAME)
            and not artifact.damage(deep=False)
        ):
            found.append(artifact)
        if len(found) == EARLIER:
            break
    return tuple(found)


def load_build(stage: Stage) -> Callable[[Build], Built]:
    return load_function(stage.build)


def load_function(path: str) -> Callable[..., Any]:
    """The function named by "module:function"."""
    module, function = path.split(":")
    return getattr(importlib.import_module(module), function)


def _pair_checks(stage: Stage, built: Built) -> list[tuple[Any, Any]]:
    by_name = {c.name: c for c in built.checks}
    names = [s.name for s in stage.checks]
    assert sorted(by_name) == sorted(names) and len(built.checks) == len(names), (
        f"{stage.name} declares the checks {names}, built {list(by_name)}"
    )
    return [(spec, by_name[spec.name]) for spec in stage.checks]


# -- the report: evidence for people, kept with the artifact so that a cached one shows it again --------------------


def write_report(out: Any, built: Built) -> None:
    write_json(
        out / REPORT,
        {
            "evidence": {k: asdict(v) for k, v in built.evidence.items()},
            "checks": {c.name: {k: asdict(v) for k, v in c.evidence.items()} for c in built.checks},
        },
    )


def read_report(artifact: Artifact) -> dict[str, Any]:
    """{"evidence": {name: Evidence}, "checks": {check name: {name: Evidence}}}"""
    data = json.loads(artifact.file(REPORT).read_text())
    return {
        "evidence": {k: Evidence(**v) for k, v in data["evidence"].items()},
        "checks": {
            name: {k: Evidence(**v) for k, v in found.items()} for name, found in data["checks"].items()
        },
    }


# -- the environment ----------------------------------------------------------------------------------------------

RECORDED_PACKAGES = (
    "sft-pipeline",
    "dagster",
    "mlflow",
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "pyarrow",
    "numpy",
    "flash-attn",
)


@lru_cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What the artifact was built with. Nothing here is part of a data version, and no path or secret is recorded."""
    return {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: found for name in RECORDED_PACKAGES if (found := _version(name))},
        "platform": f"{platform.system()}-{platform.machine()}",
        "cpus": os.cpu_count(),
        "accelerator": _accelerator(),
    }


@lru_cache
def _accelerator() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


@lru_cache
def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(PACKAGE_DIR), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "-C", str(PACKAGE_DIR), "status", "--porcelain", "--", "."],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        found.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "") if found.returncode == 0 else None
    )


def checks_of(artifact: Artifact, asset: str) -> list[dict[str, Any]]:
    """The artifact's checks in the form of the command line's JSON."""
    return [{"asset": asset, **c} for c in artifact.manifest.checks]


def failed_blocking(artifacts: Sequence[Artifact]) -> list[str]:
    return [
        f"{a.manifest.asset}: {c['name']}: {c['description']}"
        for a in artifacts
        for c in a.manifest.checks
        if c["blocking"] and not c["passed"]
    ]

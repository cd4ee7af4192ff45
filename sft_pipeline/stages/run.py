"""Runs stages against the store: fingerprint, reuse, build, commit, refs. No artifact is made elsewhere."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.code_version import code_version
from sft_pipeline.stages.environment import environment, package_version
from sft_pipeline.stages.report import REPORT, failed_blocking, write_report
from sft_pipeline.stages.stage import Branch, Build, Built, Evidence, Stage
from sft_pipeline.store import Artifact, InputEntry, Store
from sft_pipeline.store.files import clear_disk_errors
from sft_pipeline.store.manifest import fingerprint_of_parts
from sft_pipeline.store.uses import StoreUse

MOST_EARLIER = 3  # artifacts that a stage may take rows over from

Isolate = Callable[[Stage, Build], Built]


@dataclass(frozen=True)
class Tracked:
    """What an experiment tracker gives to one build.

    Attributes:
        run_id: The tracking run, recorded in the manifest.
        report: Where the build reports to.
        evidence: Added to the artifact's evidence, for example a link to the tracking run.
        committed: Called with the finished artifact.
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
        publish: Called with every artifact that was built or reused; must do nothing a second time.
        isolate: Runs an isolated stage's build in a child process; None runs it here.
    """

    store: Store
    report: Reporter
    run_id: str | None = None
    earlier_run_ids: tuple[str, ...] = ()
    current: bool = True
    tracker: Tracker = untracked
    publish: Callable[[Artifact, Branch, "Run"], None] = lambda artifact, branch, run: None
    isolate: Isolate | None = None


@dataclass(frozen=True)
class StageOutcome:
    """An artifact, and whether it was there already."""

    artifact: Artifact
    cached: bool


def run_until(last: str, stages: Mapping[str, Stage], branch: Branch, run: Run) -> dict[str, StageOutcome]:
    """Brings a stage and its ancestors up to date, in order, in this process.

    Raises:
        BlockedError: A blocking check failed on the way.
        InputError: Bad data or configuration.
    """
    outcomes = {}
    for name in needed_for(last, stages):
        outcomes[name] = run_stage(stages[name], stages, branch, run)
        failed = failed_blocking([outcomes[name].artifact])
        if failed:
            raise BlockedError("; ".join(failed))
    return outcomes


def needed_for(last: str, stages: Mapping[str, Stage]) -> list[str]:
    """A stage and its ancestors, in graph order."""
    wanted = {last}
    for name in reversed(list(stages)):
        if name in wanted:
            wanted.update(stages[name].inputs, stages[name].acceptance)
    return [name for name in stages if name in wanted]


def run_stage(stage: Stage, stages: Mapping[str, Stage], branch: Branch, run: Run) -> StageOutcome:
    """Brings one asset up to date: reuses the artifact of this fingerprint, or builds and commits it.

    Args:
        stages: All stages by name, to find the inputs' owners.

    Raises:
        BlockedError: An input is missing its acceptance.
        InputError: An input is not built, damaged, or the stage's own input is bad.
    """
    asset = stage.asset(branch)
    run.report.stage(asset, "started")
    try:
        with run.store.using() as use:
            with use.steady():
                inputs = resolve_inputs(stage, stages, branch, run)
                use.add(a.path.name for a in (*inputs.data.values(), *inputs.acceptance.values()))
            fingerprint, parts = fingerprint_of(stage, branch, inputs.data)
            with use.steady():
                use.add([fingerprint])
                artifact, cached = _reusable(stage, run.store, fingerprint), True
            if artifact is None:
                waiting = f"{asset}: another process is building it; waiting"
                with run.store.building(fingerprint, on_wait=lambda: run.report.log(waiting)) as out:
                    # Another process may have built it while this one waited for the lock.
                    artifact = _reusable(stage, run.store, fingerprint)
                    if artifact is None:
                        cached = False
                        for data in inputs.data.values():
                            data.verify(deep=True)  # what is read is hashed, or rot would get fresh hashes
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
                                earlier=earlier_builds(stage, branch, run, use) if stage.reuses_rows else (),
                                outside=parts["outside"],
                            )
                            isolate = run.isolate if stage.isolated else None
                            built = isolate(stage, build) if isolate else stage.load_build()(build)
                            artifact = _commit(stage, built, build, parts, inputs, run, tracked)
                            tracked.committed(artifact)
            run.store.set_ref(artifact, run_id=run.run_id, current=run.current)
            run.publish(artifact, branch, run)
    except BaseException:
        run.report.stage(asset, "failed")
        raise
    if not cached:
        from sft_pipeline.stages.summary import summarize

        for text, level in summarize(artifact):
            run.report.log(text, level)
    accepted = artifact.manifest.accepted
    run.report.stage(asset, ("cached" if cached else "built") if accepted else "not accepted")
    return StageOutcome(artifact, cached)


@dataclass(frozen=True)
class Inputs:
    """Upstream artifacts by stage name: those that are read, and those that must only have accepted."""

    data: Mapping[str, Artifact]
    acceptance: Mapping[str, Artifact]

    def entries(self) -> dict[str, InputEntry]:
        return {n: a.as_input() for n, a in self.data.items()} | {
            n: a.as_input("acceptance") for n, a in self.acceptance.items()
        }


def resolve_inputs(stage: Stage, stages: Mapping[str, Stage], branch: Branch, run: Run) -> Inputs:
    """The artifacts that the stage reads: this run's own, else the current ones; intact and accepted.

    Raises:
        BlockedError: One is not accepted, or its acceptance was given for something else.
        InputError: One is not built, or damaged.
    """
    asset = stage.asset(branch)
    run_ids = (*([run.run_id] if run.run_id else []), *run.earlier_run_ids)
    found = {}
    for name in (*stage.inputs, *stage.acceptance):
        upstream = stages[name].asset(branch)
        artifact = run.store.resolve(upstream, branch.snapshot, run_ids)
        if artifact is None:
            raise InputError(
                f"{asset} reads {upstream}, which is not built for snapshot {branch.snapshot}: "
                "materialize it first"
            )
        artifact.verify()
        if not artifact.manifest.accepted:
            raise BlockedError(
                f"{asset} refuses its input: {upstream} of snapshot {branch.snapshot} is not accepted. "
                f"Failed: {'; '.join(failed_blocking([artifact]))}"
            )
        found[name] = artifact
    for name in stage.acceptance:
        # An acceptance counts only for the very inputs and configuration it was given for.
        gate = stages[name]
        expected, _ = fingerprint_of(gate, branch, resolve_inputs(gate, stages, branch, run).data)
        if found[name].manifest.fingerprint != expected:
            raise BlockedError(
                f"{asset} refuses: {gate.asset(branch)} was made for other inputs or another configuration "
                "of this recipe. Materialize it again first"
            )
    return Inputs({n: found[n] for n in stage.inputs}, {n: found[n] for n in stage.acceptance})


def fingerprint_of(
    stage: Stage, branch: Branch, inputs: Mapping[str, Artifact]
) -> tuple[str, dict[str, Any]]:
    """The fingerprint of what the stage would build, and the fields of the manifest that it follows from."""
    config = stage.config(branch)
    parts: dict[str, Any] = {
        "asset": stage.asset(branch),
        "partition": branch.snapshot,
        "code_version": code_version(stage.code_package),
        "outside": stage.outside(branch),
        "packages": {name: package_version(name) for name in stage.packages},
    }
    whole, identity = config.model_dump(mode="json", by_alias=True), config.identity()
    fingerprint = fingerprint_of_parts(
        **parts,
        identity=identity,
        inputs={name: artifact.manifest.data_version for name, artifact in inputs.items()},
        # Which checks block decides what is accepted. The module that declares them is in no code version.
        blocking=[c.name for c in stage.checks if c.blocking],
    )
    return fingerprint, {**parts, "config": whole, "identity": identity if identity != whole else None}


def _reusable(stage: Stage, store: Store, fingerprint: str) -> Artifact | None:
    artifact = store.get(fingerprint)
    if artifact is None or not (stage.reuse_unaccepted or artifact.manifest.accepted):
        return None
    artifact.verify()
    return artifact


def earlier_builds(stage: Stage, branch: Branch, run: Run, use: StoreUse) -> tuple[Artifact, ...]:
    """The newest artifacts of a stage that differ in their inputs only, all of whose files are intact."""
    _, parts = fingerprint_of(stage, branch, {})
    unreadable = f"{stage.name}: no rows are taken over from an artifact"
    with use.steady():
        same = [
            artifact
            for artifact in run.store.all(lambda e: run.report.log(f"{unreadable}: {e}", "warning"))
            if artifact.manifest.asset.endswith(f"/{stage.name}")
            and all(
                getattr(artifact.manifest, k) == parts[k]
                for k in ("code_version", "config", "outside", "packages")
            )
        ]
        use.add(artifact.path.name for artifact in same)
    found: list[Artifact] = []
    for artifact in reversed(same):
        if damage := artifact.damage(deep=True):
            run.report.log(
                f"{stage.name}: no rows are taken over from a damaged artifact: {damage[0]}", "warning"
            )
        else:
            found.append(artifact)
        if len(found) == MOST_EARLIER:
            break
    return tuple(found)


def _commit(
    stage: Stage,
    built: Built,
    build: Build,
    parts: Mapping[str, Any],
    inputs: Inputs,
    run: Run,
    tracked: Tracked,
) -> Artifact:
    """Writes the report and the manifest of what was built, and makes the staged folder an artifact."""
    by_name = {c.name: c for c in built.checks}
    declared = [s.name for s in stage.checks]
    assert sorted(c.name for c in built.checks) == sorted(declared), (
        f"{stage.name} declares the checks {declared}, built {list(by_name)}"
    )
    checks = [
        {
            "name": spec.name,
            "blocking": spec.blocking,
            "passed": bool(by_name[spec.name].passed),
            "description": by_name[spec.name].description,
        }
        for spec in stage.checks
    ]
    write_report(build.out, {**built.evidence, **tracked.evidence}, built)
    return run.store.commit(
        build.out,
        volatile=(*built.volatile, REPORT),
        fields={
            **parts,
            "inputs": inputs.entries(),
            "reused_from": [artifact.as_input("rows") for artifact in built.reused_from],
            "accepted": all(c["passed"] for c in checks if c["blocking"]),
            "counts": dict(built.counts),
            "checks": checks,
            "environment": environment(),
            "dagster_run_id": run.run_id,
            "mlflow_run_id": tracked.run_id,
        },
    )

"""The engine: fingerprints, reuse, refusal of what is not accepted."""

from dataclasses import replace
from pathlib import Path

import pytest

from sft_pipeline.config.base import Config
from sft_pipeline.config.dataset import DatasetConfig
from sft_pipeline.errors import BlockedError, InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.report import read_report
from sft_pipeline.stages.run import Run, needed_for, run_stage, run_until
from sft_pipeline.stages.stage import Branch, Build, Built, Check, CheckSpec, Stage, number
from sft_pipeline.store import Artifact, Store

BUILT: list[str] = []
PASSES = {"first": True, "gate": True}


class Numbers(Config):
    value: int


def build_first(build: Build) -> Built:
    BUILT.append("first")
    (build.out / "value.txt").write_text(str(build.config.value))
    return Built(
        {"rows": build.config.value},
        (Check("good", PASSES["first"], "as told"),),
        evidence={"row_count": number(3)},
    )


def build_gate(build: Build) -> Built:
    BUILT.append("gate")
    return Built({}, (Check("safe", PASSES["gate"], "as told"),))


def build_last(build: Build) -> Built:
    BUILT.append("last")
    (build.out / "value.txt").write_text(build.inputs["first"].file("value.txt").read_text() + "!")
    return Built({"rows": 1})


def stage(name: str, value: int = 1, **more) -> Stage:
    return Stage(
        name=name,
        description=name,
        kinds=frozenset(),
        config=lambda _: Numbers(value=value),
        load_build=lambda: globals()[f"build_{name}"],
        **({"inputs": (), "checks": (), "of_dataset": True} | more),
    )


def graph(first: int = 1, gate: int = 1, last: int = 1) -> dict[str, Stage]:
    return {
        "first": stage("first", first, checks=(CheckSpec("good", True, ""),)),
        "gate": stage(
            "gate", gate, inputs=("first",), checks=(CheckSpec("safe", True, ""),), reuse_unaccepted=False
        ),
        "last": stage("last", last, inputs=("first",), acceptance=("gate",)),
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    BUILT.clear()
    monkeypatch.setitem(PASSES, "first", True)
    monkeypatch.setitem(PASSES, "gate", True)
    monkeypatch.setattr("sft_pipeline.stages.run.code_version", lambda name: "c")
    return Run(Store(tmp_path), Reporter())


BRANCH = Branch(DatasetConfig(name="d", sources=[{"path": "rows"}]), "s1")


def test_a_second_run_reuses_everything(run: Run) -> None:
    first = run_until("last", graph(), BRANCH, run)
    second = run_until("last", graph(), BRANCH, run)
    assert BUILT == ["first", "gate", "last"]
    assert [o.cached for o in first.values()] == [False] * 3 and [o.cached for o in second.values()] == [
        True
    ] * 3
    assert read_report(second["first"].artifact)["evidence"]["row_count"] == number(3)


def test_a_changed_configuration_builds_only_what_reads_it(run: Run) -> None:
    run_until("last", graph(), BRANCH, run)
    outcomes = run_until("last", graph(gate=2, last=2), BRANCH, run)
    assert BUILT == ["first", "gate", "last", "gate", "last"]
    assert outcomes["first"].cached


def test_an_equal_output_of_changed_code_keeps_downstream_fresh(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_until("last", graph(), BRANCH, run)
    monkeypatch.setattr(
        "sft_pipeline.stages.run.code_version", lambda name: "new" if name == "first" else "c"
    )
    run_until("last", graph(), BRANCH, run)
    assert BUILT == ["first", "gate", "last", "first"]


def test_another_output_of_changed_code_rebuilds_what_follows(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_other(build: Build) -> Built:
        built = build_first(build)
        (build.out / "value.txt").write_text("other")
        return built

    before = run_until("last", graph(), BRANCH, run)
    monkeypatch.setattr(
        "sft_pipeline.stages.run.code_version", lambda name: "new" if name == "first" else "c"
    )
    stages = graph()
    stages["first"] = replace(stages["first"], load_build=lambda: build_other)
    after = run_until("last", stages, BRANCH, run)
    assert BUILT == ["first", "gate", "last"] * 2
    for name in stages:
        assert after[name].artifact.manifest.fingerprint != before[name].artifact.manifest.fingerprint


def test_which_checks_block_is_part_of_the_fingerprint(run: Run) -> None:
    run_until("first", graph(), BRANCH, run)
    stages = graph()
    stages["first"] = replace(stages["first"], checks=(CheckSpec("good", False, "other words"),))
    assert not run_until("first", stages, BRANCH, run)["first"].cached
    stages["first"] = replace(stages["first"], checks=(CheckSpec("good", False, "more words"),))
    assert run_until("first", stages, BRANCH, run)["first"].cached


def test_a_failed_blocking_check_stops_and_a_later_run_refuses(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASSES, "first", False)
    with pytest.raises(BlockedError, match="good: as told"):
        run_until("last", graph(), BRANCH, run)
    assert run.store.resolve("d/first", "s1").manifest.accepted is False
    with pytest.raises(BlockedError, match="d/first of snapshot s1 is not accepted"):
        run_stage(graph()["gate"], graph(), BRANCH, run)


def test_a_gate_that_refused_is_asked_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "gate", False)
    with pytest.raises(BlockedError):
        run_until("last", graph(), BRANCH, run)
    with pytest.raises(BlockedError, match="refuses its input"):
        run_stage(graph()["last"], graph(), BRANCH, run)
    monkeypatch.setitem(PASSES, "gate", True)
    run_until("last", graph(), BRANCH, run)
    assert BUILT == ["first", "gate", "gate", "last"]


def test_an_acceptance_given_for_another_configuration_does_not_count(run: Run) -> None:
    run_until("last", graph(), BRANCH, run)
    with pytest.raises(BlockedError, match="another configuration"):
        run_stage(graph(gate=2)["last"], graph(gate=2), BRANCH, run)


def test_a_missing_input_is_named(run: Run) -> None:
    with pytest.raises(InputError, match="d/first, which is not built for snapshot s1"):
        run_stage(graph()["gate"], graph(), BRANCH, run)


def test_a_damaged_input_is_named(run: Run) -> None:
    outcomes = run_until("first", graph(), BRANCH, run)
    outcomes["first"].artifact.file("value.txt").write_text("22")
    with pytest.raises(InputError, match=r"value\.txt"):
        run_stage(graph()["gate"], graph(), BRANCH, run)


def test_a_run_with_overrides_reads_its_own_and_moves_no_ref(run: Run) -> None:
    usual = run_until("last", graph(), BRANCH, run)
    other = replace(run, run_id="r", current=False)
    outcomes = run_until("last", graph(first=5), BRANCH, other)
    assert outcomes["last"].artifact.file("value.txt").read_text() == "5!"
    assert run.store.resolve("d/last", "s1") == usual["last"].artifact


def test_what_a_failed_publication_left_out_is_published_by_the_next_run(run: Run) -> None:
    published = []

    def publish(artifact: Artifact, branch: Branch, by: Run) -> None:
        published.append((artifact.manifest.asset, by.current))
        if len(published) == 1:
            raise ConnectionError("away")

    run = replace(run, publish=publish)
    with pytest.raises(ConnectionError):
        run_until("first", graph(), BRANCH, run)
    run_until("first", graph(), BRANCH, replace(run, current=False))
    assert BUILT == ["first"] and published == [("d/first", True), ("d/first", False)]


def test_an_error_leaves_no_object(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Build) -> Built:
        raise InputError("bad row")

    monkeypatch.setitem(globals(), "build_first", broken)
    with pytest.raises(InputError, match="bad row"):
        run_until("first", graph(), BRANCH, run)
    assert not run.store.objects.exists() and not list(run.store.staging.iterdir())


def test_needed_for_lists_ancestors_in_order() -> None:
    assert needed_for("last", graph()) == ["first", "gate", "last"]
    assert needed_for("gate", graph()) == ["first", "gate"]

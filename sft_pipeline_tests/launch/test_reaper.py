"""Runs that lost their process are ended in Dagster's records; all others are left alone."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from sft_pipeline.launch.reaper import WORKER_TAG, is_alive, process_identity, reap_dead_runs


@pytest.fixture
def instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """A real instance, with its sqlite storage in the test's SFT_HOME."""
    with dg.DagsterInstance.get() as instance:
        yield instance


def dead_process() -> str:
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    identity = process_identity(process.pid)
    process.communicate()
    return identity


def add_run(instance: dg.DagsterInstance, status: dg.DagsterRunStatus, tags: dict[str, str], **more) -> str:
    from dagster._core.test_utils import create_run_for_test

    return create_run_for_test(instance, job_name="j", status=status, tags=tags, **more).run_id


def test_identities():
    own = process_identity()
    assert is_alive(own) is True
    assert is_alive(dead_process()) is False
    host, boot, pid, start = own.split(":")
    assert is_alive(f"elsewhere:{boot}:{pid}:{start}") is None
    assert is_alive(f"{host}:another-boot:{pid}:{start}") is False
    assert is_alive(f"{host}:{boot}:{pid}:{int(start) - 1}") is False
    assert is_alive("nonsense") is None


def test_reaps_what_is_dead_and_nothing_else(instance: dg.DagsterInstance):
    dead, status = dead_process(), dg.DagsterRunStatus
    started = add_run(instance, status.STARTED, {WORKER_TAG: dead})
    starting = add_run(instance, status.STARTING, {WORKER_TAG: dead})
    canceling = add_run(instance, status.CANCELING, {WORKER_TAG: dead})
    alive = add_run(instance, status.STARTED, {WORKER_TAG: process_identity()})
    elsewhere = add_run(instance, status.STARTED, {WORKER_TAG: "elsewhere:b:1:1"})
    untagged = add_run(instance, status.STARTED, {})
    waiting = add_run(instance, status.NOT_STARTED, {WORKER_TAG: dead})
    done = add_run(instance, status.SUCCESS, {WORKER_TAG: dead})
    retry = add_run(instance, status.STARTING, {WORKER_TAG: dead}, parent_run_id=started, root_run_id=started)

    instance.event_log_storage.set_concurrency_slots("gpu", 2)
    assert instance.event_log_storage.claim_concurrency_slot("gpu", started, "step").is_claimed
    assert instance.event_log_storage.claim_concurrency_slot("gpu", alive, "step").is_claimed

    ended = reap_dead_runs(instance)

    def now(run_id: str) -> dg.DagsterRunStatus:
        return instance.get_run_by_id(run_id).status

    assert (now(started), now(starting), now(canceling)) == (status.FAILURE, status.FAILURE, status.CANCELED)
    assert (now(alive), now(elsewhere), now(untagged)) == (status.STARTED,) * 3
    assert (now(waiting), now(done), now(retry)) == (status.NOT_STARTED, status.SUCCESS, status.STARTING)
    assert len(ended) == 3 and all(any(r in line for line in ended) for r in (started, starting, canceling))
    slots = instance.event_log_storage.get_concurrency_info("gpu")
    assert [s.run_id for s in slots.claimed_slots] == [alive]
    assert any("is gone" in (e.message or "") for e in instance.all_logs(started))
    assert reap_dead_runs(instance) == []

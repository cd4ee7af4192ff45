"""Runs whose worker died with nobody left to report it: after a power loss, or while no daemon was watching.

Such a run stays STARTED for ever, and keeps its pool slots. Its worker is known by a tag of the run.
"""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from sft_pipeline.launch import processes

if TYPE_CHECKING:
    from dagster import DagsterInstance, DagsterRun

WORKER_TAG = "sft/worker"  # the identity of the process that runs the run


def process_identity(pid: int | None = None) -> str:
    """`host:boot:pid:start` of a process of this machine, by default of this one.

    It is unique over machines and restarts.

    Raises:
        ProcessLookupError: There is no such process.
    """
    return f"{_host()}:{_boot()}:{processes.token(pid)}"


def is_alive(identity: str) -> bool | None:
    """Whether the process of that identity runs; None for one of another host, or an unreadable identity.

    A process of an earlier boot of this host is dead.
    """
    try:
        host, boot, pid, start = identity.rsplit(":", 3)
        token = f"{int(pid)}:{int(start)}"
    except ValueError:
        return None
    if host != _host():
        return None
    return boot == _boot() and processes.is_running(token)


def reap_dead_runs(instance: "DagsterInstance") -> list[str]:
    """Ends, in Dagster's records, the runs whose worker is dead on this host, and frees their pool slots.

    A run that was being cancelled becomes CANCELED, any other FAILURE. Untouched: runs without the worker
    tag, runs of other hosts, and retries that have not started yet and still carry the tag of the run they
    retry.

    Returns:
        One line for each run that was ended.
    """
    from dagster import DagsterRunStatus, RunsFilter

    running = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]
    ended = []
    for run in instance.get_runs(RunsFilter(statuses=running)):
        identity = run.tags.get(WORKER_TAG)
        if identity is None or is_alive(identity) is not False or _is_inherited(instance, run, identity):
            continue
        now = instance.get_run_by_id(run.run_id)
        if now is None or now.status not in running or now.tags.get(WORKER_TAG) != identity:
            continue  # somebody else dealt with it, or it goes on, since it was listed
        what = f"the process of this run ({identity}) is gone"
        if now.status == DagsterRunStatus.CANCELING:
            instance.report_run_canceled(now, f"{what}; it was being canceled")
            end = "canceled"
        else:
            instance.report_run_failed(now, f"{what}. Run it again to resume")
            end = "failed"
        if instance.event_log_storage.supports_global_concurrency_limits:
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        ended.append(f"run {run.run_id} ({run.job_name}) had lost its process and is now marked {end}")
    return ended


def is_running(instance: "DagsterInstance", run: "DagsterRun") -> bool:
    """Whether a run goes on, will begin, or is about to be retried; not where its worker died unnoticed."""
    from dagster import DagsterRunStatus

    if run.status == DagsterRunStatus.FAILURE:
        # The daemon starts the retry a moment later.
        return run.tags.get("dagster/will_retry") == "true" and "dagster/auto_retry_run_id" not in run.tags
    if run.is_finished:
        return False
    identity = run.tags.get(WORKER_TAG)
    dead = identity is not None and is_alive(identity) is False
    return not dead or _is_inherited(instance, run, identity or "")


def _is_inherited(instance: "DagsterInstance", run: "DagsterRun", identity: str) -> bool:
    """Whether the tag was copied by a retry from its parent: it names that one's worker, not its own."""
    parent = instance.get_run_by_id(run.parent_run_id) if run.parent_run_id else None
    return parent is not None and parent.tags.get(WORKER_TAG) == identity


def _host() -> str:
    return platform.node().replace(":", "_")


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"uid{os.getuid()}"  # not Linux: a restart cannot be told from going on, a missing pid can

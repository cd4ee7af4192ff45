"""Dagster's instance, whose databases one process sets up while others wait."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from sft_pipeline.project import sft_home
from sft_pipeline.store.files import locked_if_possible


@contextmanager
def open_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of DAGSTER_HOME.

    Its SQLite databases are made by whoever opens them first. Two that do so at once each find a half-made
    one of the other ("table alembic_version already exists").
    """
    with locked_if_possible(sft_home() / "dagster" / ".setup.lock"):
        instance = dg.DagsterInstance.get()
        for storage in (instance.run_storage, instance.event_log_storage, instance.schedule_storage):
            assert storage is not None  # each is made when it is first asked for
        instance.get_dynamic_partitions("none")  # the event log's index, when it is first read
    with instance:
        yield instance

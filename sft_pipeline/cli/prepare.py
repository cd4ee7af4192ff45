"""Brings the data assets of a branch up to date in this process, for commands that look and do not run."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.run import Run, StageOutcome, run_until
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Store
from sft_pipeline.store.files import remove_tree


@contextmanager
def prepared(branch: Branch, last: str, console: Console) -> Iterator[dict[str, StageOutcome]]:
    """The artifacts up to `last`, built where they are missing. No ref of the store moves.

    Raises:
        BlockedError: A blocking check failed on the way.
        InputError: Bad data or configuration.
    """
    store = Store()
    run_id = f"look-{uuid.uuid4().hex}"
    with ConsoleReporter(console) as reporter:
        try:
            yield run_until(last, STAGES, branch, Run(store, reporter, run_id=run_id, current=False))
        finally:
            remove_tree(store.refs / ".runs" / run_id)

"""What several commands do first: find the recipe, dataset and snapshot, and build the data assets."""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from sft_pipeline.cli.console import ConsoleReporter
from sft_pipeline.config.load import Catalog, find_recipe, load_catalog
from sft_pipeline.errors import InputError
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.stages.run import Run, StageOutcome, run_until
from sft_pipeline.stages.stage import Branch
from sft_pipeline.store import Store
from sft_pipeline.store.files import remove_tree
from sft_pipeline.store.partition_names import why_unusable


def find_branch(
    recipe: str, snapshot: str | None, overrides: Sequence[str], console: Console
) -> tuple[Catalog, Branch]:
    """The branch of a recipe on a snapshot, the newest one by name where none is given.

    Raises:
        InputError: The recipe, its dataset or the snapshot is not there.
    """
    catalog = load_catalog()
    found = find_recipe(catalog, recipe, overrides, read_schemas=True)
    dataset = catalog.datasets[found.dataset]
    refused: list[str] = []
    known = snapshots(dataset.sources, refused.append)
    if snapshot is not None and (why := why_unusable(snapshot)):
        raise InputError(f"dataset {dataset.name} has no snapshot {snapshot!r}: the name {why}")
    if not known:
        raise InputError(
            f"dataset {dataset.name} has no snapshot: put a subfolder of rows into {dataset.sources[0].path}"
            + "".join(f". {message}" for message in refused)
        )
    for message in refused:
        console.print(message, style="yellow")
    if snapshot is not None and snapshot not in known:
        raise InputError(
            f"dataset {dataset.name} has no snapshot {snapshot!r}; it has {', '.join(known[-5:])}"
        )
    return catalog, Branch(dataset, snapshot or known[-1], found)


@contextmanager
def prepared(branch: Branch, last: str, console: Console) -> Iterator[dict[str, StageOutcome]]:
    """The artifacts up to `last`, built in this process where they are missing. No ref of the store moves.

    Raises:
        BlockedError: A blocking check failed on the way.
        InputError: Bad data or configuration.
    """
    store = Store()
    run_id = f"look-{uuid.uuid4().hex}"
    with ConsoleReporter(console) as reporter, store.using() as use:
        with use.steady():
            use.add(runs=[run_id])
        try:
            yield run_until(last, STAGES, branch, Run(store, reporter, run_id=run_id, current=False))
        finally:
            remove_tree(store.refs / ".runs" / run_id)

"""What several commands do first: find the recipe, the dataset and the snapshot."""

from collections.abc import Sequence

from sft_pipeline.config.load import Catalog, find_recipe, load_catalog
from sft_pipeline.errors import InputError
from sft_pipeline.stages.raw_rows.locate import snapshots
from sft_pipeline.stages.stage import Branch


def find_branch(recipe: str, snapshot: str | None, overrides: Sequence[str] = ()) -> tuple[Catalog, Branch]:
    """The branch of a recipe on a snapshot, the newest one by name where none is given.

    Raises:
        InputError: The recipe, its dataset or the snapshot is not there.
    """
    catalog = load_catalog()
    found = find_recipe(catalog, recipe, overrides)
    dataset = catalog.datasets[found.dataset]
    known = snapshots(dataset)
    if not known:
        raise InputError(
            f"dataset {dataset.name} has no snapshot: put a subfolder of rows into {dataset.sources[0].path}"
        )
    if snapshot is not None and snapshot not in known:
        raise InputError(
            f"dataset {dataset.name} has no snapshot {snapshot!r}; it has {', '.join(known[-5:])}"
        )
    return catalog, Branch(dataset, snapshot or known[-1], found)

"""`sft lineage`: the chain from an exported model back to its source files."""

from pathlib import Path
from typing import Any

from rich.console import Console

from sft_pipeline.errors import InputError


def show_lineage(model_dir: str, *, verify: bool, out: Console | None) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`."""
    from sft_pipeline.lineage import verify as verification
    from sft_pipeline.lineage import walk

    path = Path(model_dir).expanduser().resolve()
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the folder of an exported model")
    chain = walk.chain(path)
    raise NotImplementedError(chain, verification)

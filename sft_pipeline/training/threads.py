"""How many CPU threads a model's operations are worth."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

SMALL_PARAMETERS = 20_000_000


@contextlib.contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """One thread for a small model on a CPU, for the time of the context; others keep what torch has.

    The operations of a small model last microseconds: threads that wait for each other cost more than they give, and
    where other programs run they cost everything (a million parameters, generating on 2 busy cores: 28 s with one
    thread, 308 s with two).
    """
    parameters = list(model.parameters())
    before = torch.get_num_threads()
    small = (
        all(p.device.type == "cpu" for p in parameters)
        and sum(p.numel() for p in parameters) < SMALL_PARAMETERS
    )
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

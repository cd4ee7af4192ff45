"""Every setting that holds for the whole process, and why: environment, threads, kernels, random state.

Nothing else of `training` changes what other code in the same process sees. A model stage runs in a process
of its own (`launch`), so none of this reaches Dagster or the command line.
"""

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL_PARAMETERS = 20_000_000


def set_environment() -> None:
    """Variables that libraries read only once, when they are imported; what the user has set stays."""
    # Threads that wait for work sleep instead of spinning. Two OpenMP pools (torch's and bitsandbytes') or a
    # busy machine otherwise fight for the cores: on 2 cores under load a training step took 2.0 s spinning
    # and 0.4 s asleep, a 4-bit forward 310 ms and 7 ms.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # TRL reports each trainer that is made to the hub's maker.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def set_tensorboard_folder(folder: Path) -> None:
    """transformers 5 takes it from the environment alone; what the user has set stays."""
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))


def disable_progress_bars() -> None:
    """Loading a model reports nothing; transformers' bars would be drawn over the log."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def be_deterministic(seed: int) -> None:
    """Seeds every generator and asks for deterministic kernels, where there are any."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_all(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Otherwise torch fills what it allocates with NaN in this mode: a kernel more for many operations.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_all(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


@contextlib.contextmanager
def keep_rng() -> Iterator[None]:
    """Puts every random state back as it was, so that an evaluation does not change the training."""
    import numpy as np
    import torch

    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy_state)


@contextlib.contextmanager
def threads_for(model: Any) -> Iterator[None]:
    """One thread for a small model on a CPU, for the time of the context; others keep what torch has.

    The operations of a small model last microseconds: threads that wait for each other cost more than they
    give, and where other programs run they cost everything (a million parameters, generating on 2 busy cores:
    28 s with one thread, 308 s with two).
    """
    import torch

    parameters = list(model.parameters())
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    before = torch.get_num_threads()
    if on_cpu and sum(p.numel() for p in parameters) < SMALL_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

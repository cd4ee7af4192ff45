"""Worker processes that stand by: started before they are needed, kept for the next one who needs the same.

begin(prepare, arguments)          # at once; imports and loads while others work
worker = take(prepare, arguments)  # the one that stands by, or a new one
keep(worker)                       # instead of ending it
"""

import pickle
import threading
from collections.abc import Callable
from typing import Any

from sft_pipeline.stages.workers import Worker, worker_count

Prepare = Callable[..., Callable[[Any], Any]]

_lock = threading.Lock()
_waiting: dict[tuple[Prepare, bytes], Worker] = {}


def begin(prepare: Prepare, arguments: tuple[Any, ...] = ()) -> None:
    """Starts a worker unless one stands by, or there is but one CPU to work with (SFT_WORKERS=1)."""
    if worker_count() > 1:
        keep(take(prepare, arguments))


def take(prepare: Prepare, arguments: tuple[Any, ...] = ()) -> Worker:
    """A worker for oneself. To be ended, or kept for others if it has no more results to give."""
    with _lock:
        worker = _waiting.pop((prepare, pickle.dumps(arguments)), None)
    if worker and not worker.alive:
        worker.end()
        worker = None
    return worker or Worker(prepare, arguments)


def keep(worker: Worker) -> None:
    """Lets a worker stand by; one like it that does so already is ended."""
    with _lock:
        key = (worker.prepare, pickle.dumps(worker.arguments))
        before, _waiting[key] = _waiting.pop(key, None), worker
    if before:
        before.end()


def end_all() -> None:
    """Ends all that stand by."""
    with _lock:
        workers = [_waiting.popitem()[1] for _ in range(len(_waiting))]
    for worker in workers:
        worker.end()

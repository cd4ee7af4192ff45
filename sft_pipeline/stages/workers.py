"""The local engine of the data stages: ordered maps over items, mostly batches of rows.

    for batch, checked in ordered_map(Checker, (config,), batches): ...

`Checker(config)` is made once per process and called with every item. Results come back in the order of the
items, and never depend on the number of workers. The first INLINE_ITEMS items are processed here, so that
little data starts no process at all; after them at most AHEAD items per worker are in flight, which bounds
memory.

`SFT_WORKERS` sets the number of workers, a whole number from 1; with 1 this process does everything. The
default is the number of CPUs that this process may use, at most 8.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sft_pipeline.errors import InputError, SftError

INLINE_ITEMS = 24  # a worker takes a second to start, as long as a batch of 4,096 rows ten times over
AHEAD = 2  # one item is worked on while the next is on its way
MAX_WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count() -> int:
    """How many workers there may be.

    Raises:
        InputError: SFT_WORKERS is not a positive whole number.
    """
    if given := os.environ.get("SFT_WORKERS", "").strip():
        if not given.isdecimal() or int(given) < 1:
            raise InputError(f"SFT_WORKERS={given}: give a whole number from 1, or unset it")
        return int(given)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MAX_WORKERS)


def ordered_map(
    prepare: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Iterable[Item],
    *,
    function_here: Callable[[Item], Result] | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields (item, result) in the order of the items. Closing it ends the workers early.

    Args:
        prepare: Called once per process with `arguments`; returns the function for the items. A function or
            class of an importable module.
        arguments: Picklable, like items and results. (A slice of an Arrow batch pickles the whole buffers.)
        function_here: The function that `prepare` returned in this process already; with it, workers start
            at the first item.

    Raises:
        InputError: SFT_WORKERS is not a positive whole number.
        SftError: A worker died.
        Exception: Whatever `prepare`, the function or `items` raises, as itself.
    """
    workers, items = worker_count(), iter(items)

    def results() -> Generator[tuple[Item, Result], None, None]:
        inline: int | None = INLINE_ITEMS
        if workers == 1:
            inline = None  # all of them
        elif function_here is not None:
            inline = 0
        function = function_here
        for item in islice(items, inline):
            function = function or prepare(*arguments)
            yield item, function(item)
        function = None  # it may be large, and the workers have their own
        following = list(islice(items, 1))
        if not following:
            return
        context = multiprocessing.get_context("spawn")  # not forked, because this process has threads
        theirs, ours = context.Pipe(duplex=False)  # a worker ends when this end closes, also by a SIGKILL
        pool = ProcessPoolExecutor(workers, context, _begin_worker, (theirs, prepare, arguments))
        try:
            yield from _in_order(pool, _work, chain(following, items), AHEAD * workers, stop=ours.close)
        except BrokenProcessPool:
            raise SftError(
                "a worker process died, most likely because memory ran out. Run again with fewer "
                "workers, for example SFT_WORKERS=1"
            ) from None
        finally:
            ours.close()
            theirs.close()

    return results()


def threaded_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[tuple[Item, Result], None, None]:
    """Yields (item, result) in the order of the items, for functions that release the interpreter's lock.

    At most AHEAD items per thread are taken in advance. One thread means the calling one.
    """
    if threads == 1:
        for item in items:
            yield item, function(item)
    else:
        yield from _in_order(ThreadPoolExecutor(threads), function, iter(items), AHEAD * threads)


def _in_order(
    pool: Executor,
    function: Callable[[Item], Result],
    items: Iterator[Item],
    in_flight: int,
    stop: Callable[[], None] = lambda: None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields (item, result) in order; at the end shuts the pool down, after an error calls `stop` before."""
    flying: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            if len(flying) == in_flight:
                done, future = flying.popleft()
                yield done, future.result()
            flying.append((item, pool.submit(function, item)))
        while flying:
            done, future = flying.popleft()
            yield done, future.result()
    except BaseException:
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# -- in a worker process --

_prepare: Callable[[], Callable[[Any], Any]]  # what a worker works with; set when it begins
_function: Callable[[Any], Any] | None = None


def _begin_worker(
    parent: Connection, prepare: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]
) -> None:
    global _prepare
    _prepare = partial(prepare, *arguments)
    # A Ctrl-C reaches every process of the terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"SFT_WORKERS": "1", "TOKENIZERS_PARALLELISM": "false"}  # one worker, one core
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """Ends this process when the parent's end of the pipe closes.

    The executor has no such thing: its workers wait for ever for the next item of a parent that was killed.
    """
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(0)


def _work(item: Any) -> Any:
    global _function
    try:
        _function = _function or _prepare()
        return _function(item)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that does not survive pickling makes the executor report a broken pool
            raise SftError(f"{type(error).__name__} in a worker process: {error}") from None
        raise

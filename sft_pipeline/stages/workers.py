"""The local engine of the data stages: an ordered map over items (usually Arrow record batches) in worker processes.

    for batch, judged in ordered_map(Judge, (config,), batches): ...

`Judge(config)` is made once per process and called with every item. Results come back in the order of the items, and
what comes back never depends on the number of workers. The first items (INLINE_ITEMS of them) are done in this process,
so little data starts no process at all; after them at most AHEAD items per worker are in flight, which bounds memory.

`SFT_WORKERS` sets the number of worker processes, a whole number from 1; with 1 all is done in this process. The
default is the number of CPUs that this process may use, at most 8.

A worker is a fresh interpreter that imports what the function needs and nothing else. It is never forked, because this
process has threads; and multiprocessing's own spawn would import this process's main module in every worker, which
under Dagster costs more than the work. The only tie is a socket: when this process ends, however it ends, the socket
closes and the worker with it. Workers have a process group of their own, so a Ctrl-C reaches this process alone.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, TypeVar, cast

from sft_pipeline.errors import InputError, SftError

INLINE_ITEMS = 24  # a worker takes half a second to start, as long as a batch of 4,096 rows ten times over
AHEAD = 2  # one item is worked on while the next is on its way
MAX_WORKERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count() -> int:
    """How many worker processes there may be.

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
    here: Callable[[Item], Result] | None = None,
    inline: Callable[[int, Item], bool] | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields (item, result) in the order of the items. Close it (`contextlib.closing`) to end the workers early.

    Args:
        prepare: Called once per process with `arguments`; returns the function for the items. A function or class of
            an importable module.
        arguments: Picklable, like items and results. (A slice of an Arrow batch pickles the whole buffers.)
        here: What `prepare` has returned already in this process, if it has.
        inline: Asked with the number of an item (from 0) and the item whether it is still done in this process; the
            first one that is not starts the workers, which then do all others. The first INLINE_ITEMS by default.

    Raises:
        InputError: SFT_WORKERS is no number.
        SftError: A worker died.
        Exception: Whatever `prepare`, the function or `items` raises, as itself.
    """
    return _map(prepare, arguments, iter(items), worker_count(), here, inline or _few)


def threaded_map(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Yields the function's results in the order of the items, for functions that leave the interpreter free.

    At most AHEAD items per thread are taken in advance. With one thread, all is done in this one.
    """
    if threads == 1:
        yield from map(function, items)
        return
    flying: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(flying) == AHEAD * threads:
                    yield flying.popleft().result()
                flying.append(pool.submit(function, item))
            while flying:
                yield flying.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _few(number: int, _: Any) -> bool:
    return number < INLINE_ITEMS


def _map(
    prepare: Callable[..., Callable[[Item], Result]],
    arguments: tuple[Any, ...],
    items: Iterator[Item],
    workers: int,
    function: Callable[[Item], Result] | None,
    inline: Callable[[int, Item], bool],
) -> Generator[tuple[Item, Result], None, None]:
    pool: list[Worker] = []
    flying: deque[tuple[Item, Answer]] = deque()
    try:
        for number, item in enumerate(items):
            if not pool and (workers == 1 or inline(number, item)):
                function = function or prepare(*arguments)
                yield item, function(item)
                continue
            if not pool:
                function = None  # it may be large, and is not needed beside the workers
                pool += (Worker(prepare, arguments) for _ in range(workers))
            if len(flying) == AHEAD * workers:
                done, answer = flying.popleft()
                yield done, answer.get()
            flying.append((item, pool[number % workers].ask(item)))
        while flying:
            done, answer = flying.popleft()
            yield done, answer.get()
    finally:
        for worker in pool:
            worker.end()


class Worker:
    """The parent's end of a worker process, which begins at once with `prepare(*arguments)`."""

    def __init__(self, prepare: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
        self.prepare, self.arguments = prepare, arguments
        self._connection, theirs = Pipe()
        with theirs:
            start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", start],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for this process alone: it may be printing JSON
                process_group=0,
                # One worker, one core, and no workers of workers.
                env={
                    **os.environ,
                    "SFT_WORKERS": "1",
                    "OMP_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )
        self._asked: deque[Answer] = deque()
        self._error: tuple[bool, Any] | None = None
        self._send((prepare, arguments))

    def ask(self, item: Any) -> "Answer":
        """Has an item worked on after those asked before it.

        Raises:
            SftError: The worker died.
        """
        answer = Answer(self)
        answer.given = self._error
        if self._error is None:
            self._send(item)
            self._asked.append(answer)
        return answer

    def _send(self, item: Any) -> None:
        data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        try:
            self._connection.send_bytes(data)
        except OSError:
            raise self._death() from None

    def take_answer(self) -> None:
        """Waits for the next answer, and gives it to who asked for it. An error is the answer to all that was asked.

        Raises:
            SftError: The worker died.
        """
        try:
            data = self._connection.recv_bytes()
        except (EOFError, OSError):
            raise self._death() from None
        given = self._asked.popleft().given = pickle.loads(data)
        if not given[0]:  # it says no more after that
            self._error = given
            while self._asked:
                self._asked.popleft().given = given

    @property
    def has_answered(self) -> bool:
        """Whether an answer is there to take."""
        return self._connection.poll()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def _death(self) -> SftError:
        code = self._process.wait()
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit status {code}"
        return SftError(
            f"a worker process {how}; most often the memory ran out. Run again with SFT_WORKERS=1, or fewer workers"
        )

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class Answer:
    """What a worker will say to an item.

    Attributes:
        given: (good, the result or the error) once it is here.
    """

    def __init__(self, worker: Worker | None) -> None:
        self._worker, self.given = worker, cast(tuple[bool, Any] | None, None)

    @classmethod
    def known(cls, value: Any) -> "Answer":
        """One that nobody has to wait for."""
        answer = cls(None)
        answer.given = (True, value)
        return answer

    @property
    def is_here(self) -> bool:
        """Whether it can be had without waiting."""
        while self.given is None and self._worker and self._worker.has_answered:
            self._worker.take_answer()
        return self.given is not None

    def get(self) -> Any:
        """The function's result.

        Raises:
            SftError: The worker died.
            Exception: What the function raised.
        """
        while self.given is None:
            assert self._worker
            self._worker.take_answer()
        good, answer = self.given
        if not good:
            raise answer
        return answer


def _serve(fileno: int) -> None:
    """The life of a worker: what comes first is (prepare, arguments), then items."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.meta_path.insert(0, _WithoutPandas())
    connection = Connection(fileno)
    arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, arrived), daemon=True).start()
    try:
        prepare, arguments = pickle.loads(arrived.get())
        function = prepare(*arguments)
        while True:
            answer = (True, function(pickle.loads(arrived.get())))
            connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
    except BaseException as error:
        connection.send_bytes(pickle.dumps((False, _portable(error))))
        threading.Event().wait()  # for the parent to read the answer and end this process


class _WithoutPandas(MetaPathFinder, Loader):
    """pyarrow imports pandas when it first converts a list, if it can: half a second and 40 MB that no worker needs."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == "pandas" else None

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError("worker processes do without pandas")


def _listen(connection: Connection, arrived: "queue.SimpleQueue[bytes]") -> None:
    """Takes items off the socket, so that the parent never waits for a worker that waits for the parent."""
    while True:
        try:
            arrived.put(connection.recv_bytes())
        except (EOFError, OSError):  # the parent is done or gone: end at once, whatever is being worked on
            os._exit(0)


def _portable(error: BaseException) -> BaseException:
    """The error if it survives the journey, else its text."""
    error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return SftError(f"{type(error).__name__} in a worker process: {error}")
    return error

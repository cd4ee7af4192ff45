"""The worker pool: order, errors, deaths, and that few items start no process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from sft_pipeline.errors import InputError, SftError
from sft_pipeline.stages import workers
from sft_pipeline.stages.workers import ordered_map, threaded_map, worker_count
from sft_pipeline_tests.command import ROOT


@pytest.fixture(autouse=True)
def three_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_WORKERS", "3")
    monkeypatch.setattr(workers, "INLINE_ITEMS", 2)


def waiting_for_a_second_worker(folder: str, parent: int) -> Callable[[int], tuple[int, int]]:
    """In a worker, waits until a second one is at work too, so that both surely take items."""

    def work(item: int) -> tuple[int, int]:
        if os.getpid() != parent:
            Path(folder, str(os.getpid())).touch()
            deadline = time.monotonic() + 60
            while len(os.listdir(folder)) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        return item, os.getpid()

    return work


def counting() -> Callable[[int], tuple[int, int]]:
    calls = iter(range(10**6))
    return lambda item: (os.getpid(), next(calls))


def failing(at: int) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == at:
            raise InputError(f"row {item} is bad")
        return item

    return work


def failing_to_prepare(parent: int) -> Callable[[int], int]:
    if os.getpid() != parent:
        raise InputError("no tokenizer there")
    return lambda item: item


class Unportable(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def raising_the_unportable() -> Callable[[int], int]:
    def work(item: int) -> int:
        if item > 5:
            raise Unportable(1, 2)
        return item

    return work


def killing_itself(parent: int) -> Callable[[int], int]:
    def work(item: int) -> int:
        if os.getpid() != parent and item > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work


def reporting_its_environment() -> Callable[[int], tuple[list[str], bool, str]]:
    return lambda _: (
        [name for name in ("torch", "transformers", "mlflow") if name in sys.modules],
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        os.environ["SFT_WORKERS"],
    )


def echoing() -> Callable[[bytes], bytes]:
    return lambda data: data


def asleep(folder: str) -> Callable[[int], None]:
    def work(item: int) -> None:
        if item >= 2:
            Path(folder, str(os.getpid())).touch()
            time.sleep(300)  # until it is killed

    return work


def workers_left() -> list[psutil.Process]:
    """Children of this process, without multiprocessing's tracker of shared resources, which stays."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if "resource_tracker" not in " ".join(p.cmdline())]


def test_results_come_in_the_order_of_the_items_from_several_processes(tmp_path: Path) -> None:
    found = list(ordered_map(waiting_for_a_second_worker, (str(tmp_path), os.getpid()), iter(range(40))))
    assert [item for item, _ in found] == [item for _, (item, _) in found] == list(range(40))
    pids = [pid for _, (_, pid) in found]
    assert set(pids[:2]) == {os.getpid()} and len(set(pids[2:])) > 1 and os.getpid() not in pids[2:]
    assert not workers_left()


def test_one_worker_or_few_items_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    assert [r for _, r in ordered_map(counting, (), range(2))] == [(os.getpid(), 0), (os.getpid(), 1)]
    monkeypatch.setenv("SFT_WORKERS", "1")
    assert [r for _, r in ordered_map(counting, (), range(9))] == [(os.getpid(), i) for i in range(9)]
    here = list(ordered_map(counting, (), range(9), function_here=lambda item: -item))
    assert here == [(item, -item) for item in range(9)]


def test_with_a_function_in_this_process_already_the_workers_begin_at_the_first_item() -> None:
    found = [r for _, r in ordered_map(counting, (), range(9), function_here=lambda _: (os.getpid(), 0))]
    assert len(found) == 9 and os.getpid() not in {pid for pid, _ in found}
    assert list(ordered_map(counting, (), [], function_here=lambda _: (0, 0))) == []


def test_each_process_prepares_once_and_items_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    with closing(ordered_map(counting, (), items())) as results:
        found = [next(results)[1] for _ in range(20)]
        assert len(taken) <= 20 + workers.AHEAD * 3 + 1
    calls: dict[int, list[int]] = {}
    for pid, call in found:
        calls.setdefault(pid, []).append(call)
    assert len(calls) > 1 and all(c == list(range(len(c))) for c in calls.values())
    assert not workers_left()


def test_errors_come_back_as_themselves_and_end_the_workers() -> None:
    got = []
    with pytest.raises(InputError, match="row 7 is bad") as error:
        for item, _ in ordered_map(failing, (7,), range(100)):
            got.append(item)
    assert got == list(range(7)) and "in work" in str(error.value.__cause__)  # the worker's own traceback
    with pytest.raises(InputError, match="no tokenizer there"):
        list(ordered_map(failing_to_prepare, (os.getpid(),), range(100)))
    with pytest.raises(SftError, match="Unportable in a worker process: 1 and 2"):
        list(ordered_map(raising_the_unportable, (), range(10)))

    def items() -> Iterator[int]:
        yield from range(5)
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        list(ordered_map(failing, (-1,), items()))
    assert not workers_left()


def test_a_dead_worker_is_a_clear_error() -> None:
    got = []
    with pytest.raises(SftError, match=r"a worker process died.*SFT_WORKERS=1"):
        for item, _ in ordered_map(killing_itself, (os.getpid(),), range(100)):
            got.append(item)
    assert got == list(range(len(got))) and 2 <= len(got) <= 7 and not workers_left()


def test_workers_import_only_what_they_need_and_leave_ctrl_c_to_the_parent() -> None:
    found = [r for _, r in ordered_map(reporting_its_environment, (), range(5))]
    loaded, ignored, count = found[-1]
    assert loaded == [] and ignored and count == "1"


def test_items_larger_than_any_socket_buffer_do_not_lock_up() -> None:
    items = [bytes([i]) * (5 << 20) for i in range(16)]
    assert all(item == result for item, result in ordered_map(echoing, (), items))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        # Whoever runs the tests may be ignoring signals, which children inherit.
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from sft_pipeline.stages import workers; from sft_pipeline_tests.stages.test_workers import asleep\n"
        f"workers.INLINE_ITEMS = 2\nlist(workers.ordered_map(asleep, ({str(tmp_path)!r},), range(9)))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(pids := [int(p.name) for p in tmp_path.iterdir()]) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(pids) == 3
        os.kill(parent.pid, number)
        _, stderr = parent.communicate(timeout=20)
        _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=10)
        assert not alive
        assert stderr.count("Traceback") == (number == signal.SIGINT), (
            stderr
        )  # the parent's, none of a worker
    finally:
        parent.kill()


@pytest.mark.parametrize("given", ["0", "-1", "many", "1.5"])
def test_sft_workers_must_be_a_positive_whole_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_WORKERS", given)
    with pytest.raises(InputError, match=f"SFT_WORKERS={given}"):
        ordered_map(echoing, (), [])


def test_the_default_is_the_cpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFT_WORKERS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    assert worker_count() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(99)), raising=False)
    assert worker_count() == workers.MAX_WORKERS


# -- threads


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_keep_the_order_and_take_few_items_ahead(threads: int) -> None:
    taken: list[int] = []
    second_done = threading.Event()

    def items() -> Iterator[int]:
        for item in range(30):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        if item == 1:
            second_done.set()
        elif item == 0 and threads > 1:
            assert second_done.wait(60)  # so that it is done after the second
        return item

    for position, (item, result) in enumerate(threaded_map(work, items(), threads)):
        assert item == result == position
        assert len(taken) <= position + 1 + workers.AHEAD * threads


def test_an_error_in_a_thread_comes_out_in_its_place() -> None:
    done: list[int] = []
    with pytest.raises(InputError, match="row 7 is bad"):
        for _, result in threaded_map(failing(7), range(20), 3):
            done.append(result)
    assert done == list(range(7))

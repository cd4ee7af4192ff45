"""Processes that stand by, and the painter that draws in one."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sft_pipeline.errors import InputError, SftError
from sft_pipeline.stages import standby
from sft_pipeline.stages.painter import Painter


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SFT_WORKERS", "2")
    standby.end_all()
    yield
    standby.end_all()


def adding(start: int) -> Callable[[int], tuple[int, int]]:
    return lambda item: (start + item, os.getpid())


def pid_of(worker) -> int:
    return worker.ask(0).get()[1]


def test_one_that_stands_by_is_taken_and_kept_for_the_same_work_only():
    standby.begin(adding, (10,))
    standby.begin(adding, (10,))
    mine, another, other_work = (standby.take(adding, (n,)) for n in (10, 10, 20))
    pids = {pid_of(w) for w in (mine, another, other_work)}
    assert len(pids) == 3 and os.getpid() not in pids
    assert mine.ask(5).get()[0] == 15 and other_work.ask(5).get()[0] == 25
    first = pid_of(mine)
    standby.keep(mine)
    assert pid_of(standby.take(adding, (10,))) == first
    for worker in (mine, another, other_work):
        worker.end()


def test_one_that_died_while_it_stood_by_is_replaced():
    worker = standby.take(adding, (1,))
    pid = pid_of(worker)
    standby.keep(worker)
    os.kill(pid, signal.SIGKILL)
    for _ in range(100):
        if not worker.alive:
            break
        time.sleep(0.02)
    again = standby.take(adding, (1,))
    assert again.ask(1).get() == (2, pid_of(again)) and pid_of(again) != pid
    again.end()


def test_nothing_is_started_where_there_is_one_cpu(monkeypatch):
    monkeypatch.setenv("SFT_WORKERS", "1")
    before = {process.pid for process in psutil.Process().children()}
    standby.begin(adding, (3,))
    assert before.issuperset(process.pid for process in psutil.Process().children())


def test_end_all_leaves_no_process():
    worker = standby.take(adding, (1,))
    process = psutil.Process(pid_of(worker))
    standby.keep(worker)
    standby.end_all()
    assert not process.is_running()


def test_answers_come_to_those_who_asked_in_any_order():
    worker = standby.take(adding, (0,))
    answers = [worker.ask(n) for n in range(5)]
    assert [a.get()[0] for a in reversed(answers)] == [4, 3, 2, 1, 0]
    late = worker.ask(9)
    for _ in range(200):
        if late.is_here:
            break
        time.sleep(0.01)
    assert late.is_here and late.get()[0] == 9
    worker.end()


def failing_at(at: int) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == at:
            raise InputError(f"row {item} is bad")
        return item

    return work


def test_after_an_error_nobody_waits_for_an_answer_that_will_not_come():
    worker = standby.take(failing_at, (2,))
    answers = [worker.ask(n) for n in range(5)]
    with pytest.raises(InputError, match="row 2"):
        answers[4].get()
    assert [a.get() for a in answers[:2]] == [0, 1]
    for answer in (*answers[2:], worker.ask(7)):
        with pytest.raises(InputError, match="row 2"):
            answer.get()
    worker.end()


# -- the painter ----------------------------------------------------------------------------------------------------


def draw(path: Path, text: str) -> None:
    path.write_text(f"{text} {os.getpid()}")


def refuse(path: Path) -> None:
    raise ValueError("no such colour")


def test_all_is_drawn_at_the_end_of_the_context_by_one_process_for_all_stages(tmp_path):
    for stage in ("one", "two"):
        with Painter() as painter:
            painter.draw(draw, tmp_path / f"{stage}.a", text="a")
            painter.draw(draw, tmp_path / f"{stage}.b", "b")
        assert (tmp_path / f"{stage}.a").read_text().startswith("a ")
        assert (tmp_path / f"{stage}.b").read_text().startswith("b ")
    pids = {p.read_text().split()[1] for p in tmp_path.iterdir()}
    assert len(pids) == 1 and str(os.getpid()) not in pids


def test_with_one_worker_it_is_drawn_here(tmp_path, monkeypatch):
    monkeypatch.setenv("SFT_WORKERS", "1")
    with Painter() as painter:
        painter.draw(draw, tmp_path / "here", "x")
        assert (tmp_path / "here").read_text() == f"x {os.getpid()}"


def test_what_a_drawing_raises_comes_out_and_the_next_stage_can_draw(tmp_path):
    with pytest.raises(ValueError, match="no such colour"), Painter() as painter:
        painter.draw(refuse, tmp_path / "never")
    with Painter() as painter:
        painter.draw(draw, tmp_path / "again", "x")
    assert (tmp_path / "again").exists()


def test_a_painter_that_is_killed_is_told_of(tmp_path):
    with pytest.raises(SftError, match="worker process"), Painter() as painter:
        painter.draw(os.kill, os.getpid(), 0)  # nothing; the process is up
        painter.draw(_kill_oneself)


def _kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_stages_own_error_is_the_one_that_is_told(tmp_path):
    with pytest.raises(KeyError), Painter() as painter:
        painter.draw(refuse, tmp_path / "never")
        raise KeyError("the stage failed")

"""Threads that work side by side, where there are cores for them and more than one thing to do."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from rag_blockcache import workers
from rag_blockcache.workers import Workers


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    monkeypatch.setattr(workers, "num_cores", lambda: 2)


def test_tasks_run_side_by_side_and_results_come_in_their_order():
    both = threading.Barrier(2)

    def meet(number):
        both.wait(10)
        return number

    with Workers() as group:
        results = group.begin([partial(meet, number) for number in range(4)])
        assert [result() for result in results] == [0, 1, 2, 3]


@pytest.mark.parametrize(("num_cores", "num_tasks"), [(1, 3), (8, 1)])
def test_one_core_or_one_task_pays_for_no_threads(monkeypatch, num_cores, num_tasks):
    monkeypatch.setattr(workers, "num_cores", lambda: num_cores)
    before = threading.active_count()
    with Workers() as group:
        results = group.begin([threading.get_ident] * num_tasks)
        assert threading.active_count() == before
        assert [result() for result in results] == [threading.get_ident()] * num_tasks


def test_there_are_no_more_threads_than_cores_nor_than_eight(monkeypatch):
    monkeypatch.setattr(workers, "num_cores", lambda: 100)
    before, may_end = threading.active_count(), threading.Event()
    with Workers() as group:
        group.begin([partial(may_end.wait, 10)] * 20)
        assert threading.active_count() == before + 8
        may_end.set()


def test_an_error_is_raised_where_its_result_is_asked_for():
    def fail():
        raise OSError("the disk has gone")

    with Workers() as group:
        failed, fine = group.begin([fail, lambda: 7])
        assert fine() == 7
        with pytest.raises(OSError, match="the disk has gone"):
            failed()


def test_where_no_thread_can_be_had_tasks_run_where_their_results_are_asked_for(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with Workers() as group:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        results = group.begin([threading.get_ident] * 3)
        assert [result() for result in results] == [threading.get_ident()] * 3


def test_a_task_whose_thread_did_not_come_runs_once(monkeypatch):
    """The pool keeps what it could not start a thread for, and the one thread that it has may take it."""
    runs, start = [], threading.Thread.start

    def only_the_first(thread):
        if runs:
            raise RuntimeError("can't start new thread")
        runs.append("thread")
        start(thread)

    with Workers() as group:
        monkeypatch.setattr(threading.Thread, "start", only_the_first)
        may_go = threading.Event()
        tasks = [partial(may_go.wait, 10), *(partial(runs.append, number) for number in range(3))]
        results = group.begin(tasks)
        may_go.set()
        for result in results:
            result()
    assert sorted(runs[1:]) == [0, 1, 2]


def test_whoever_leaves_waits_for_what_has_begun_and_drops_what_has_not():
    begun, may_end, done = threading.Barrier(3), threading.Event(), []

    def slow(number):
        begun.wait(10)
        assert may_end.wait(10)
        done.append(number)

    with Workers() as group:
        group.begin([partial(slow, number) for number in range(5)])
        begun.wait(10)
        threading.Timer(0.1, may_end.set).start()
    assert sorted(done) == [0, 1]

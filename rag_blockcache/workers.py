"""Threads that read or write blocks side by side: one alone moves far less in a second than memory gives."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Generic, Self, TypeVar

import torch

Result = TypeVar("Result")

_MOST = 8  # a large machine has other requests to serve


class Workers:
    """Threads of one request; they end with its ``with`` block, and what has not begun then never does.

    What they run must let go of the interpreter while it works, as checksums, files and NumPy's copies do.
    """

    def __init__(self) -> None:
        self._num_threads = min(num_cores(), _MOST)
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="rag_blockcache-work")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def begin(self, tasks: Sequence[Callable[[], Result]]) -> list[Callable[[], Result]]:
        """Begin tasks, the first one first; on a GPU they go on in the stream of whoever calls.

        Args:
            tasks: What to run, each once.

        Returns:
            A function for each that waits for it, and returns or raises what it did. A single task, or any on
            a single core, runs only then, and where it is called: a thread would take longer to come.
        """
        if len(tasks) < 2 or self._num_threads < 2:
            return list(tasks)
        is_on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream() if is_on_gpu else None
        once = [_Once(partial(_in_stream, stream, task)) for task in tasks]
        begun: list[Callable[[], Result]] = []
        for task in once:
            try:
                begun.append(self._threads.submit(task).result)
            except RuntimeError:  # the system gives no thread, or the interpreter is about to end
                return [*begun, *once[len(begun) :]]
        return begun


class _Once(Generic[Result]):
    """A task that runs once, whoever asks: one that was handed to a thread that never came may run here.

    Args:
        task: What to run.
    """

    def __init__(self, task: Callable[[], Result]) -> None:
        self._task, self._lock = task, threading.Lock()
        self._done: Future[Result] = Future()

    def __call__(self) -> Result:
        with self._lock:
            if not self._done.done():
                try:
                    self._done.set_result(self._task())
                except BaseException as error:
                    self._done.set_exception(error)
        return self._done.result()


def _in_stream(stream: torch.cuda.Stream | None, task: Callable[[], Result]) -> Result:
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        return task()


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

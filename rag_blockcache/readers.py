"""Threads that read blocks side by side: one alone reads far less in a second than memory gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

Result = TypeVar("Result")

_MOST = 8  # a large machine has other requests to serve


class Readers:
    """Threads of one request; they end with its ``with`` block, and what has not begun then never does.

    What they run must let go of the interpreter while it reads, as checksums and NumPy's copies do.
    """

    def __init__(self) -> None:
        self._num_threads = min(num_cores(), _MOST)
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="rag_blockcache-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def begin(self, tasks: Sequence[Callable[[], Result]]) -> list[Callable[[], Result]]:
        """Begin tasks, the first one first.

        Args:
            tasks: May run twice, where threads give out on the way.

        Returns:
            A function for each that waits for it, and returns or raises what it did. A single task, or any on
            a single core, runs only then, and where it is called: a thread would take longer to come.
        """
        if len(tasks) < 2 or self._num_threads < 2:
            return list(tasks)
        try:
            return [self._threads.submit(task).result for task in tasks]
        except RuntimeError:  # the system gives no thread, or the interpreter is about to end
            return list(tasks)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Blocks brought from the disk into memory in the background, before a prompt asks for them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rag_blockcache.passages import Passage
from rag_blockcache.planner import Planner
from rag_blockcache.store import TieredStore

logger = logging.getLogger(__name__)

_MOST_WAITING = 64  # calls; behind so many, blocks would come too late for their prompt


class Prefetcher:
    """Reads blocks by the passages that they belong to, a call after the other, in a thread of its own.

    Args:
        planner: Names blocks.
        store: Holds them.
    """

    def __init__(self, planner: Planner, store: TieredStore) -> None:
        self._planner, self._store = planner, store
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None  # from the first call on
        self._num_waiting = 0

    def prefetch(self, passages: Sequence[Passage]) -> Future[int]:
        """See ``BlockCache.prefetch``."""
        with self._lock:
            if self._store.disk is None or not passages or self._num_waiting == _MOST_WAITING:
                nothing: Future[int] = Future()
                nothing.set_result(0)
                return nothing
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="rag_blockcache-prefetch")
            self._num_waiting += 1
            future = self._thread.submit(self._bring, passages)
        future.add_done_callback(self._note)
        return future

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(cancel_futures=True)

    def _bring(self, passages: Sequence[Passage]) -> int:
        return len(self._store.prefetch(block.block_id for block in self._planner.blocks(passages)))

    def _note(self, future: Future[int]) -> None:
        """Count what is done, and say what went wrong, since nobody may ask the future."""
        with self._lock:
            self._num_waiting -= 1
        error = None if future.cancelled() else future.exception()
        if error is not None:
            logger.warning("blocks were not read ahead: %s", error)

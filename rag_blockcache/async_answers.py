"""Answers for code that runs in an event loop, which never waits for a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from rag_blockcache.answers import Answer, AnswerStream

_END = object()


class AsyncAnswerStream(AsyncIterator[str]):
    """Pieces of an answer, as they come, for ``async for``.

    All work, the loading of a model and the making of a plan included, is done by threads of its own, none of
    them of the loop's executor, which others need. Closing it, cancelling the task that reads it, or losing
    the last reference to it, stops decoding after the current token.

    Args:
        start: Starts the answer; called in a thread at the first piece.
    """

    def __init__(self, start: Callable[[], AnswerStream]) -> None:
        self._start = start
        self._pump: _Pump | None = None
        self._has_ended = False

    @property
    def answer(self) -> Answer | None:
        """The whole answer once all pieces were read, what there is of it after ``aclose``; None before."""
        return None if self._pump is None else self._pump.answer

    async def __anext__(self) -> str:
        if self._has_ended:
            raise StopAsyncIteration
        if self._pump is None:
            self._pump = _Pump(self._start)
        try:
            piece = await self._pump.pieces.get()
        except asyncio.CancelledError:
            self._pump.cancel()
            raise
        if isinstance(piece, str):
            return piece
        self._has_ended = True
        if self._pump.error is not None:
            raise self._pump.error
        raise StopAsyncIteration

    async def whole(self) -> Answer:
        """Read to the end, and return the whole answer."""
        async for _ in self:
            pass
        assert self.answer is not None
        return self.answer

    async def aclose(self) -> None:
        """Stop decoding; what was generated so far is in ``answer``."""
        if self._pump is None:
            self._has_ended = True
            return
        self._pump.cancel()
        while not self._has_ended:
            self._has_ended = await self._pump.pieces.get() is _END

    def __del__(self) -> None:
        if self._pump is not None:
            self._pump.cancel()


class _Pump:
    """The thread that reads a stream, and hands its pieces to the event loop."""

    def __init__(self, start: Callable[[], AnswerStream]) -> None:
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._stream: AnswerStream | None = None
        self._is_cancelled = threading.Event()
        threading.Thread(target=self._run, args=(start,), daemon=True, name="rag-blockcache-async").start()

    def cancel(self) -> None:
        """Have decoding stop after the current token; does not wait for it."""
        self._is_cancelled.set()
        if self._stream is not None:
            self._stream.cancel()

    def _run(self, start: Callable[[], AnswerStream]) -> None:
        try:
            with start() as self._stream:
                if self._is_cancelled.is_set():
                    self._stream.cancel()
                for piece in self._stream:
                    self._hand_over(piece)
                self.answer = self._stream.answer
        except BaseException as error:  # whatever it is, the reader is who must see it
            self.error = error
        self._hand_over(_END)

    def _hand_over(self, piece: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # the loop was closed: nobody reads any more
            self.cancel()

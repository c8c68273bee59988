"""Inputs of one batch, answered together, each with its own callbacks, cache look-up and errors.

LangChain runs a batch as so many single calls. That is kept, down to the last callback: the calls run side by
side, and where each would ask the engine, it waits for the others. Once all have asked, or ended without
asking (their answer was cached, say), the engine answers them in one batch. A call that is cancelled ends its
row of the batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from langchain_core.runnables.config import ContextThreadPoolExecutor
from torch import Tensor
from transformers import StoppingCriteria

from rag_blockcache import Answer, Chat, SharedCache, Text
from rag_blockcache.errors import InvalidInputError

_Result = TypeVar("_Result")


def together(engine: SharedCache, calls: Sequence[Callable[[], _Result]], group_size: int) -> list[_Result]:
    """Run calls, and answer what they ask the engine in batches of ``group_size``.

    Returns:
        Their results, in order; the first exception of a group is raised once all of the group have ended.
    """
    results: list[_Result] = []
    for group in _groups(calls, group_size):
        if len(group) == 1:
            results.append(group[0]())
            continue
        batch = _Batch(engine, len(group))
        with ContextThreadPoolExecutor(max_workers=len(group)) as executor:
            running = [executor.submit(partial(batch.run, *numbered)) for numbered in enumerate(group)]
        results += [each.result() for each in running]
    return results


async def atogether(
    engine: SharedCache, calls: Sequence[Callable[[], Awaitable[_Result]]], group_size: int
) -> list[_Result]:
    """Run calls as ``together`` does, without keeping the event loop."""
    results: list[_Result] = []
    for group in _groups(calls, group_size):
        if len(group) == 1:
            results.append(await group[0]())
            continue
        batch = _Batch(engine, len(group))
        results += await asyncio.gather(*(batch.arun(*numbered) for numbered in enumerate(group)))
    return results


def ask(engine: SharedCache, request: Chat | Text, options: Mapping[str, Any]) -> Answer:
    """Have a request answered, in the batch that the call in progress belongs to, if any."""
    call = _call_in_progress(engine)
    if call is None:
        return engine.answer(request, **options)
    return call.ask(request, options).answer.result()


async def aask(engine: SharedCache, request: Chat | Text, options: Mapping[str, Any]) -> Answer:
    """Have a request answered as ``ask`` does, without keeping the event loop."""
    call = _call_in_progress(engine)
    if call is None:
        return await engine.aanswer(request, **options)
    asked = call.ask(request, options)
    try:
        return await asyncio.wrap_future(asked.answer)
    except asyncio.CancelledError:
        asked.is_given_up.set()
        raise


def leave_batch() -> None:
    """Let the batch that the call in progress belongs to go on without it, because it streams."""
    call = _current.get()
    if call is not None:
        call.leave()


def _groups(calls: Sequence[_Result], size: int) -> Iterator[Sequence[_Result]]:
    return (calls[start : start + size] for start in range(0, len(calls), size))


@dataclass(frozen=True)
class _Asked:
    """What one call wants to know."""

    index: int
    request: Chat | Text
    options: Mapping[str, Any]
    answer: Future[Answer] = field(default_factory=Future)
    is_given_up: threading.Event = field(default_factory=threading.Event)


class _NobodyWaits(StoppingCriteria):
    """Ends those rows of a batch whose answer nobody waits for any more."""

    def __init__(self, asked: Sequence[_Asked]) -> None:
        self._asked = asked

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        given_up = torch.tensor([each.is_given_up.is_set() for each in self._asked])
        num_beams = len(input_ids) // len(given_up)
        return given_up.repeat_interleave(num_beams).to(input_ids.device)


class _Batch:
    """Calls that run side by side, and what they have asked so far."""

    def __init__(self, engine: SharedCache, num_calls: int) -> None:
        self.engine = engine
        self._num_awaited = num_calls
        self._asked: list[_Asked] = []
        self._lock = threading.Lock()

    def run(self, index: int, call: Callable[[], _Result]) -> _Result:
        with _Call(self, index).in_progress():
            return call()

    async def arun(self, index: int, call: Callable[[], Awaitable[_Result]]) -> _Result:
        with _Call(self, index).in_progress():
            return await call()

    def add(self, asked: _Asked) -> None:
        with self._lock:
            self._asked.append(asked)

    def count_down(self) -> None:
        """Note that one call has asked or ended; answer once none is awaited."""
        with self._lock:
            self._num_awaited -= 1
            is_complete = not self._num_awaited
        if is_complete and self._asked:
            threading.Thread(target=self._answer, daemon=True, name="rag-blockcache-batch").start()

    def _answer(self) -> None:
        asked = [each for each in self._asked if each.answer.set_running_or_notify_cancel()]
        asked.sort(key=lambda each: each.index)
        try:
            self._answer_all(asked)
        except InvalidInputError:  # of one or several of them; the others shall not suffer
            for each in asked:
                self._answer_one(each)
        except BaseException as error:  # of any kind: it would end with this thread, and its callers wait
            for each in asked:
                each.answer.set_exception(error)

    def _answer_all(self, asked: Sequence[_Asked]) -> None:
        if not asked:
            return
        requests = [each.request for each in asked]
        answers = self.engine.answer_batch(requests, **_options(asked))
        for each, answer in zip(asked, answers, strict=True):
            each.answer.set_result(answer)

    def _answer_one(self, asked: _Asked) -> None:
        try:
            asked.answer.set_result(self.engine.answer(asked.request, **_options([asked])))
        except BaseException as error:  # as above
            asked.answer.set_exception(error)


def _options(asked: Sequence[_Asked]) -> dict[str, Any]:
    """Return the options of one call, which are those of all, and have rows end that nobody waits for."""
    options = asked[0].options
    criteria = options.get("stopping_criteria") or ()
    return {**options, "stopping_criteria": [*criteria, _NobodyWaits(asked)]}


class _Call:
    """One call of a batch."""

    def __init__(self, batch: _Batch, index: int) -> None:
        self.batch, self._index = batch, index
        self.is_awaited = True

    @contextmanager
    def in_progress(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)
            self.leave()

    def ask(self, request: Chat | Text, options: Mapping[str, Any]) -> _Asked:
        asked = _Asked(self._index, request, options)
        self.batch.add(asked)
        self.leave()
        return asked

    def leave(self) -> None:
        if self.is_awaited:
            self.is_awaited = False
            self.batch.count_down()


_current: ContextVar[_Call | None] = ContextVar("rag_blockcache_batch", default=None)


def _call_in_progress(engine: SharedCache) -> _Call | None:
    """Return the call of a batch of this engine that has not asked yet."""
    call = _current.get()
    return call if call is not None and call.is_awaited and call.batch.engine is engine else None

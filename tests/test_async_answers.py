"""Answers for an event loop: it never waits, a cancelled task stops decoding, errors reach the reader."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from test_block_cache import Failing, Slow
from transformers import LogitsProcessorList

from rag_blockcache import Question, Text
from rag_blockcache.errors import InvalidInputError

ASKED = Question("Who?", ["Ada wrote the note.", "The mill has wheels."])


def processors(*given) -> LogitsProcessorList:
    return LogitsProcessorList(given)


async def longest_stall(work) -> float:
    """Return for how many seconds the loop was kept, at most, while something was awaited."""
    worst, is_done = 0.0, False

    async def watch() -> None:
        nonlocal worst
        while not is_done:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            worst = max(worst, time.perf_counter() - before - 0.005)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    await work
    is_done = True
    await watcher
    return worst


def num_answering() -> int:
    return sum(thread.name.startswith("rag-blockcache") for thread in threading.enumerate())


async def test_an_awaited_answer_is_the_answer(tiny_cache):
    expected = tiny_cache.answer(ASKED, max_new_tokens=8, policy="block")
    answer = await tiny_cache.aanswer(ASKED, max_new_tokens=8, policy="block")
    assert (answer.text, answer.token_ids, answer.num_hits) == (expected.text, expected.token_ids, 2)


async def test_pieces_are_the_text_of_the_answer(tiny_cache):
    stream = tiny_cache.astream_answer(ASKED, max_new_tokens=8)
    pieces = [piece async for piece in stream]
    assert "".join(pieces) == stream.answer.text
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_beams_can_be_awaited(tiny_cache):
    options = {"max_new_tokens": 4, "num_beams": 2, "policy": "block"}
    answer = await tiny_cache.aanswer(ASKED, **options)
    assert answer.token_ids == tiny_cache.answer(ASKED, **options).token_ids


async def test_the_loop_goes_on_while_a_step_takes_long(tiny_cache):
    slow = processors(Slow(0.1))
    stall = await longest_stall(tiny_cache.aanswer(ASKED, max_new_tokens=6, logits_processor=slow))
    assert stall < 0.08, "a step of a tenth of a second did not keep the loop"


async def test_a_cancelled_task_stops_decoding(tiny_cache):
    slow = Slow(0.02)
    task = asyncio.create_task(
        tiny_cache.aanswer(ASKED, max_new_tokens=500, logits_processor=processors(slow), eos_token_id=[])
    )
    while not slow.num_steps:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(500):
        if not num_answering():
            break
        await asyncio.sleep(0.01)
    assert not num_answering()
    assert slow.num_steps < 400


async def test_a_closed_stream_says_that_it_was_cancelled(tiny_cache):
    slow = processors(Slow(0.01))
    stream = tiny_cache.astream_answer(ASKED, max_new_tokens=500, logits_processor=slow, eos_token_id=[])
    await anext(stream)
    await stream.aclose()
    assert stream.answer.finish_reason == "cancelled"
    assert 0 < len(stream.answer.token_ids) < 500
    await stream.aclose()  # once more does no harm


async def test_a_stream_that_never_began_closes_without_work(tiny_cache):
    stream = tiny_cache.astream_answer(ASKED)
    await stream.aclose()
    assert stream.answer is None
    assert [piece async for piece in stream] == []


async def test_a_stream_that_nobody_holds_stops(tiny_cache):
    slow = Slow(0.01)
    stream = tiny_cache.astream_answer(
        ASKED, max_new_tokens=500, logits_processor=processors(slow), eos_token_id=[]
    )
    await anext(stream)
    del stream
    for _ in range(500):
        if not num_answering():
            break
        await asyncio.sleep(0.01)
    assert not num_answering()
    assert slow.num_steps < 400


@pytest.mark.parametrize(
    ("request_", "options", "error"),
    [
        (Text(""), {}, InvalidInputError),
        (ASKED, {"max_new_tokens": 0}, InvalidInputError),
        (ASKED, {"logits_processor": processors(Failing())}, LookupError),
    ],
)
async def test_an_error_reaches_who_awaits(request_, options, error, tiny_cache):
    with pytest.raises(error):
        await tiny_cache.aanswer(request_, **options)
    with pytest.raises(error):
        async for _ in tiny_cache.astream_answer(request_, **options):
            pass


def test_a_loop_that_ends_takes_its_answers_with_it(tiny_cache):
    slow = Slow(0.01)

    async def begin() -> None:
        stream = tiny_cache.astream_answer(
            ASKED, max_new_tokens=500, logits_processor=processors(slow), eos_token_id=[]
        )
        await anext(stream)

    asyncio.run(begin())
    deadline = time.perf_counter() + 10
    while num_answering() and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not num_answering()


async def test_eight_at_once_get_the_answers_of_one(tiny_cache):
    requests = [Question(f"Who is {name}?", ASKED.passages[: 1 + name % 2]) for name in range(8)]
    alone = [tiny_cache.answer(request, max_new_tokens=12, policy="block") for request in requests]
    together = await asyncio.gather(
        *(tiny_cache.aanswer(request, max_new_tokens=12, policy="block") for request in requests)
    )
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]

"""A batch is one batch of the engine, and yet every input keeps its config, its cache and its errors."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    HumanMessage,
)
from langchain_parts import (
    ScriptedEngine,
    answer,
    scripted_chat,
    scripted_llm,
)
from rag_blockcache.integrations.langchain.batching import atogether
from test_block_cache import Slow
from transformers import LogitsProcessorList

from rag_blockcache import SharedCache
from rag_blockcache.errors import ContextTooLongError, InvalidInputError

pytest_plugins = ["langchain_fixtures"]


@pytest.fixture
def batch_sizes(monkeypatch):
    """Return a list that fills with the sizes of the batches that an engine is asked for."""
    sizes, batched = [], SharedCache.answer_batch

    def counted(self, requests, **options):
        sizes.append(len(requests))
        return batched(self, requests, **options)

    monkeypatch.setattr(SharedCache, "answer_batch", counted)
    return sizes


def test_a_batch_is_one_batch_of_the_engine(chat, batch_sizes):
    questions = [f"Question {'x' * n}" for n in range(5)]
    one_by_one = [chat.invoke(question).content for question in questions]
    assert [message.content for message in chat.batch(questions)] == one_by_one
    assert [message.content for message in asyncio.run(chat.abatch(questions))] == one_by_one
    messages = [[HumanMessage(question)] for question in questions]
    assert [row[0].text for row in chat.generate(messages).generations] == one_by_one
    assert [row[0].text for row in asyncio.run(chat.agenerate(messages)).generations] == one_by_one
    assert batch_sizes == [5] * 4


def test_an_llm_answers_a_batch_at_once(llm, batch_sizes):
    prompts = [f"Prompt {'x' * n}" for n in range(5)]
    one_by_one = [llm.invoke(prompt) for prompt in prompts]
    assert all(one_by_one)
    assert llm.batch(prompts) == one_by_one
    assert asyncio.run(llm.abatch(prompts)) == one_by_one
    assert [row[0].text for row in llm.generate(prompts).generations] == one_by_one
    assert [row[0].text for row in asyncio.run(llm.agenerate(prompts)).generations] == one_by_one
    assert batch_sizes == [5] * 4


@pytest.mark.parametrize("make", [scripted_chat, scripted_llm])
@pytest.mark.parametrize(
    ("batch_size", "max_concurrency", "sizes"), [(3, None, [3, 3]), (8, 4, [4, 3]), (2, 4, [2, 2, 2])]
)
def test_batches_are_no_larger_than_asked_for(make, batch_size, max_concurrency, sizes):
    model = make(batch_size=batch_size)
    config = {"max_concurrency": max_concurrency}
    assert len(model.batch(["Hello"] * 7, config)) == 7
    assert model.engine.batch_sizes == sizes  # what is left over is one alone
    assert len(asyncio.run(model.abatch(["Hello"] * 7, config))) == 7
    assert model.engine.batch_sizes == sizes * 2


class Noted(BaseCallbackHandler):
    """Notes what it is told."""

    def __init__(self):
        self.prompts, self.ends, self.errors, self.tokens = [], [], [], []

    def on_chat_model_start(self, serialized, messages, *, tags=None, metadata=None, **_):
        self.prompts.append((messages[0][0].content, tags, (metadata or {}).get("user")))

    def on_llm_new_token(self, token, **_):
        self.tokens.append(token)

    def on_llm_end(self, response, **_):
        self.ends.append(response.generations[0][0].text)

    def on_llm_error(self, error, **_):
        self.errors.append(error)


def test_each_input_of_a_batch_keeps_its_config():
    model = scripted_chat()
    noted = [Noted() for _ in range(3)]
    configs = [
        {"callbacks": [each], "tags": [f"t{n}"], "metadata": {"user": n}} for n, each in enumerate(noted)
    ]
    for run in (model.batch, lambda *args: asyncio.run(model.abatch(*args))):
        run(["a", "b", "c"], configs)
    for n, (each, prompt) in enumerate(zip(noted, "abc", strict=True)):
        assert each.prompts == [(prompt, [f"t{n}"], n)] * 2
        assert each.ends == ["yes"] * 2
    assert model.engine.batch_sizes == [3, 3]


def test_a_batch_has_the_order_of_its_inputs():
    class Late(BaseCallbackHandler):
        def on_chat_model_start(self, *_, **__):
            time.sleep(0.05)

    model = scripted_chat()
    model.batch(["a", "b", "c"], [{"callbacks": [Late()]}, {}, {}])
    assert [request.messages[0]["content"] for request, _ in model.engine.asked] == ["a", "b", "c"]


def test_a_bad_input_does_not_spoil_a_batch():
    model = scripted_chat()
    noted = Noted()
    for run in (model.batch, lambda *args, **options: asyncio.run(model.abatch(*args, **options))):
        answers = run(["a", "bad", "c"], {"callbacks": [noted]}, return_exceptions=True)
        assert [type(each) for each in answers] == [AIMessage, InvalidInputError, AIMessage]
        with pytest.raises(InvalidInputError, match="this request is bad"):
            run(["a", "bad", "c"])
    assert len(noted.errors) == 2
    assert len(noted.ends) == 4


def test_a_failure_of_the_engine_reaches_every_input(monkeypatch):
    def fail(self, requests, **options):
        raise OSError("broken")

    monkeypatch.setattr(ScriptedEngine, "answer_batch", fail)
    answers = scripted_chat().batch(["a", "b"], return_exceptions=True)
    assert [str(each) for each in answers] == ["broken", "broken"]


def test_a_prompt_that_is_too_long_fails_alone(chat):
    answers = chat.batch(["Hello", "x" * 5000], return_exceptions=True)
    assert isinstance(answers[1], ContextTooLongError)
    assert answers[0].content == chat.invoke("Hello").content


def test_inputs_that_langchain_has_cached_are_not_asked_again():
    model = scripted_chat(cache=InMemoryCache())
    model.batch(["a", "b"])
    assert [message.content for message in model.batch(["a", "c", "b", "d"])] == ["yes"] * 4
    assert model.engine.batch_sizes == [2, 2]
    asyncio.run(model.abatch(["a", "e", "b", "f"]))
    assert model.engine.batch_sizes == [2, 2, 2]
    model.batch(["a", "b"])
    assert model.engine.batch_sizes == [2, 2, 2]
    assert len(model.engine.asked) == 6


def test_batches_stream_where_streaming_was_asked_for():
    model = scripted_chat(answer("one two"), streaming=True)
    noted = [Noted(), Noted()]
    model.batch(["a", "b"], [{"callbacks": [each]} for each in noted])
    assert [each.tokens for each in noted] == [["one", "two", ""]] * 2
    assert model.engine.batch_sizes == []


def test_an_input_that_streams_does_not_keep_the_others_waiting(monkeypatch):
    model = scripted_chat(answer("one two"))
    both_asked = threading.Event()
    batched, streamed = ScriptedEngine.answer_batch, ScriptedEngine.stream_answer

    def batch_first(self, requests, **options):
        both_asked.set()
        return batched(self, requests, **options)

    def stream_last(self, request, **options):
        assert both_asked.wait(10), "the batch waited for an input that streams"
        return streamed(self, request, **options)

    monkeypatch.setattr(ScriptedEngine, "answer_batch", batch_first)
    monkeypatch.setattr(ScriptedEngine, "stream_answer", stream_last)
    monkeypatch.setattr(
        type(model), "_should_stream", lambda self, *, run_manager=None, **_: "stream" in run_manager.tags
    )
    answers = model.batch(["a", "b", "c"], [{"tags": ["stream"]}, {}, {}])
    assert [message.content for message in answers] == ["onetwo", "one two", "one two"]
    assert model.engine.batch_sizes == [2]


def hundred_tokens(slow):
    """Return options of an answer that takes two seconds."""
    return {"max_tokens": 100, "min_new_tokens": 100, "logits_processor": LogitsProcessorList([slow])}


async def some_steps(slow):
    while slow.num_steps < 3:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("kind", "more"), [("chat", {}), ("llm", {}), ("chat", {"num_beams": 3})])
async def test_a_cancelled_batch_stops_decoding(kind, more, request):
    model, slow = request.getfixturevalue(kind), Slow(0.02)
    task = asyncio.create_task(model.abatch(["one", "another"], **hundred_tokens(slow), **more))
    await some_steps(slow)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for thread in threading.enumerate():
        if thread.name == "rag-blockcache-batch":
            thread.join()
    assert 3 <= slow.num_steps < 50


async def test_an_input_that_is_cancelled_does_not_end_the_others(chat, batch_sizes):
    alone = chat.invoke("another", max_tokens=100, min_new_tokens=100).content
    slow, tasks = Slow(0.02), {}

    async def ask(question):
        tasks[question] = asyncio.current_task()
        return await chat.ainvoke(question, **hundred_tokens(slow))

    calls = [partial(ask, question) for question in ("one", "another")]
    together = asyncio.create_task(atogether(chat.engine, calls, 2))
    await some_steps(slow)
    tasks["one"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await together
    assert (await tasks["another"]).content == alone
    assert (slow.num_steps, batch_sizes) == (100, [2])


async def longest_stall(work):
    """Return what was awaited, and for how long the event loop was kept meanwhile, at most."""
    worst, is_done = 0.0, False

    async def watch():
        nonlocal worst
        while not is_done:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            worst = max(worst, time.perf_counter() - before - 0.005)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    done = await work
    is_done = True
    await watcher
    return done, worst


@pytest.mark.parametrize("asks", ["ainvoke", "astream", "abatch"])
def test_eight_coroutines_get_their_own_answers_while_the_event_loop_runs_on(chat, asks):
    questions = [f"{'x' * n} What does number {n} say?" for n in range(8)]
    one_by_one = [chat.invoke(question).content for question in questions]
    assert len(set(one_by_one)) > 1
    slow = chat.bind(logits_processor=LogitsProcessorList([Slow(0.02)]))

    async def streamed(question):
        return sum([piece async for piece in slow.astream(question)], AIMessageChunk(content=""))

    async def ask_all():
        if asks == "abatch":
            return await slow.abatch(questions)
        return await asyncio.gather(*map(slow.ainvoke if asks == "ainvoke" else streamed, questions))

    stalls: list[float] = []
    while len(stalls) < 6 and min(stalls, default=1) > 0.05:  # other processes may keep the CPU now and then
        answers, stall = asyncio.run(longest_stall(ask_all()))
        assert [message.content for message in answers] == one_by_one
        stalls.append(stall)
    assert min(stalls) < 0.05, "an answer of a quarter of a second did not keep the loop"

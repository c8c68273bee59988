"""Passages reach the engine on every way that LangChain has, and no request learns of another's."""

from __future__ import annotations

import asyncio
import threading
import time
from weakref import WeakKeyDictionary

import pytest

pytest.importorskip("langchain_core")

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_parts import (
    DOCUMENTS,
    TEXTS,
    FixedRetriever,
    all_of,
    joined,
    last_asked,
    rag_chain,
    scripted_chat,
    scripted_llm,
)
from rag_blockcache.integrations.langchain import observer

pytest_plugins = ["langchain_fixtures"]
QUESTION = "When was the lighthouse built?"


@pytest.fixture(autouse=True)
def _nothing_was_retrieved_before(monkeypatch):
    """What other tests retrieved in this thread, outside of any chain, is not there."""
    monkeypatch.setattr(observer, "_last_found", WeakKeyDictionary())


def test_documents_of_a_call_are_shown_and_reused(chat):
    first, second = (chat.invoke(QUESTION, documents=DOCUMENTS) for _ in range(2))
    bound = chat.bind(documents=DOCUMENTS).invoke(QUESTION)
    assert first.response_metadata["num_misses"] == 3
    assert second.response_metadata["num_hits"] == bound.response_metadata["num_hits"] == 3
    num_tokens = sum(map(len, TEXTS))  # of a byte each
    assert second.usage_metadata["input_token_details"]["cache_read"] >= num_tokens
    plain = chat.invoke(QUESTION).usage_metadata["input_tokens"]
    assert second.usage_metadata["input_tokens"] > plain + num_tokens


def test_documents_that_the_messages_hold_are_not_shown_twice(chat):
    prompt = f"{joined(DOCUMENTS)}\n\n{QUESTION}"
    messages = [chat.invoke(prompt), chat.invoke(prompt, documents=DOCUMENTS)]
    assert messages[0].usage_metadata["input_tokens"] == messages[1].usage_metadata["input_tokens"]
    assert messages[1].response_metadata["num_misses"] == 3


def test_nothing_is_looked_for_where_that_is_switched_off(chat):
    chat.invoke(QUESTION, documents=DOCUMENTS)
    message = chat.invoke(joined(DOCUMENTS), finds_passages=False)
    assert (message.response_metadata["num_hits"], message.response_metadata["num_misses"]) == (0, 0)
    assert chat.invoke(joined(DOCUMENTS)).response_metadata["num_hits"] == 3


def hints_of(model):
    return list(last_asked(model)[0].hints)


@pytest.mark.parametrize("make", [scripted_chat, scripted_llm])
def test_what_a_retriever_of_the_chain_returns_is_told_to_the_engine(make):
    model = make()
    chain = rag_chain(model)

    async def by_coroutines():
        await chain.ainvoke(QUESTION)
        await all_of(chain.astream(QUESTION))
        await all_of(chain.astream_events(QUESTION, version="v2"))
        await chain.abatch([QUESTION] * 2)

    chain.invoke(QUESTION)
    list(chain.stream(QUESTION))
    chain.batch([QUESTION] * 2)
    asyncio.run(by_coroutines())
    assert len(model.engine.asked) == 9
    assert all(list(request.hints) == TEXTS for request, _ in model.engine.asked)


def test_a_request_does_not_see_what_another_retrieved():
    class Echo(FixedRetriever):
        def _get_relevant_documents(self, query, *, run_manager):
            time.sleep(0.01)
            return [Document(f"found for {query}")]

    model = scripted_chat()
    chain = rag_chain(model, Echo())

    async def at_the_same_time():
        await asyncio.gather(*(chain.ainvoke(f"task {n}") for n in range(8)))

    asyncio.run(at_the_same_time())
    chain.batch([f"batch {n}" for n in range(8)])
    for n in range(3):
        chain.invoke(f"turn {n}")
    for request, _ in model.engine.asked:
        question = request.messages[0]["content"].split("Question: ")[1]
        assert list(request.hints) == [f"found for {question}"]
    assert len(model.engine.asked) == 19
    model.invoke("Something else.")
    assert hints_of(model) == []


def test_a_retriever_outside_of_a_chain_is_observed_by_its_task_or_thread_alone():
    model = scripted_chat()

    async def retrieve_and_ask():
        await FixedRetriever().ainvoke(QUESTION)
        await model.ainvoke(QUESTION)
        asked = hints_of(model)
        await all_of(model.astream(QUESTION))
        return asked, hints_of(model)

    def retrieve_and_ask_by_hand():
        FixedRetriever().invoke(QUESTION)
        model.invoke(QUESTION)

    assert asyncio.run(retrieve_and_ask()) == (TEXTS, TEXTS)
    model.invoke(QUESTION)
    assert hints_of(model) == []
    thread = threading.Thread(target=retrieve_and_ask_by_hand)
    thread.start()
    thread.join()
    assert hints_of(model) == TEXTS
    model.invoke(QUESTION)
    assert hints_of(model) == []


def test_the_observer_takes_no_callbacks_from_others():
    class Noting(BaseCallbackHandler):
        def on_llm_start(self, *_, **__):
            events.append("start")

        def on_llm_end(self, *_, **__):
            events.append("end")

        def on_retriever_end(self, *_, **__):
            events.append("retrieved")

    events = []
    asyncio.run(rag_chain(scripted_llm()).ainvoke(QUESTION, config={"callbacks": [Noting()]}))
    assert events == ["retrieved", "start", "end"]


def test_retrievers_are_not_observed_where_that_is_switched_off():
    model = scripted_chat(observes_retrievers=False)
    rag_chain(model).invoke(QUESTION)
    assert hints_of(model) == []


def test_the_model_works_where_langchain_has_no_hook_for_observers(monkeypatch):
    monkeypatch.delattr("langchain_core.tracers.context.register_configure_hook")
    monkeypatch.setattr(observer, "_is_registered", False)
    monkeypatch.setattr("langchain_core.tracers.context._configure_hooks", [])
    model = scripted_chat()
    assert rag_chain(model).invoke(QUESTION).content == "yes"
    assert hints_of(model) == []


def test_passages_nobody_prefilled_are_learned_from_retrievers(chat):
    retriever = FixedRetriever(documents=[Document(f"{text} Unseen.") for text in TEXTS])
    first, second = (rag_chain(chat, retriever).invoke(QUESTION) for _ in range(2))
    assert first.response_metadata["num_misses"] == 3
    assert second.response_metadata["num_hits"] == 3

"""ChatBlockCache and BlockCacheLLM translate, and change nothing: the engine gets what LangChain was told."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.content import create_plaintext_block
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import tool
from langchain_parts import DOCUMENTS, FixedRetriever, ScriptedEngine, answer, joined, scripted
from pydantic import BaseModel, Field, ValidationError
from rag_blockcache.integrations.langchain import BlockCacheLLM, ChatBlockCache, observer
from rag_blockcache.integrations.langchain.messages import chat_messages, passages, shown_texts
from rag_blockcache.integrations.langchain.tools import choice_of_tool, function_tools, response_schema
from transformers import LogitsProcessor, LogitsProcessorList
from typing_extensions import TypedDict

from rag_blockcache import Chat, Passage, Text
from rag_blockcache.errors import ContextTooLongError, InvalidInputError

TEXTS = [document.page_content for document in DOCUMENTS]
QUESTION = "When was the lighthouse built?"


@pytest.fixture
def options(tiny_model, tiny_tokenizer, request):
    """Options that have every passage stored at once, and share no engine with another test."""
    shared = {"model": tiny_model, "tokenizer": tiny_tokenizer, "salt": request.node.name}
    return {**shared, "max_tokens": 12, "policy": "block", "admission": "always"}


@pytest.fixture
def chat(options):
    return ChatBlockCache(**options)


@pytest.fixture
def llm(options):
    return BlockCacheLLM(**options)


def scripted_chat(*answers, **options):
    return scripted(ChatBlockCache(model="none", **options), *(answers or (answer("yes"),)))


def scripted_llm(*answers, **options):
    return scripted(BlockCacheLLM(model="none", **options), *(answers or (answer("yes"),)))


def last_asked(model):
    return model.engine.asked[-1]


def rag_chain(model, retriever=None):
    found = {"context": (retriever or FixedRetriever()) | joined, "question": RunnablePassthrough()}
    return found | ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}") | model


async def all_of(stream):
    return [piece async for piece in stream]


# Construction


def test_without_langchain_the_extra_is_named():
    code = (
        "import sys; sys.modules['langchain_core'] = None\n"
        "from rag_blockcache.errors import MissingDependencyError\n"
        "try: import rag_blockcache.integrations.langchain\n"
        "except MissingDependencyError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'rag_blockcache[langchain]'" in run.stdout


def test_construction_loads_nothing(tmp_path):
    model = ChatBlockCache(model=str(tmp_path / "no-such-model"), cache_dir=tmp_path / "cache")
    assert not model.engine.is_loaded
    assert not (tmp_path / "cache").exists()


def test_models_with_equal_options_share_one_engine(chat, llm, options):
    assert chat.engine.get() is llm.engine.get()
    assert ChatBlockCache(**{**options, "policy": "full"}).engine.get() is chat.engine.get()
    assert ChatBlockCache(**{**options, "salt": "other"}).engine.get() is not chat.engine.get()


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="max_tokes"):
        ChatBlockCache(model="none", max_tokes=5)


def test_options_are_taken_under_both_of_their_names():
    model = ChatBlockCache(model_name="none", max_new_tokens=5, stop_sequences=["x"])
    assert (model.model, model.max_tokens, model.stop) == ("none", 5, ["x"])


def test_an_unknown_option_of_a_call_is_refused(chat):
    with pytest.raises(InvalidInputError, match="tempreture"):
        chat.invoke("Hello", tempreture=0.5)


# Answers


def test_the_answer_is_that_of_the_engine(chat):
    expected = chat.engine.answer(
        Chat([{"role": "user", "content": "Hello"}]), max_new_tokens=12, policy="block", do_sample=False
    )
    message = chat.invoke("Hello")
    assert message.content == expected.text
    assert expected.text
    assert message.usage_metadata["input_tokens"] == expected.num_prompt_tokens
    assert message.usage_metadata["output_tokens"] == len(expected.token_ids)
    assert message.response_metadata["finish_reason"] == expected.finish_reason


def test_streams_and_coroutines_give_what_invoke_gives(chat):
    async def asked_by_coroutines():
        streamed = await all_of(chat.astream("Hello"))
        return await chat.ainvoke("Hello"), sum(streamed[1:], streamed[0])

    whole = chat.invoke("Hello")
    pieces = list(chat.stream("Hello"))
    assert len(pieces) > 2
    joined_pieces = sum(pieces[1:], pieces[0])
    for other in [joined_pieces, *asyncio.run(asked_by_coroutines())]:
        assert other.content == whole.content
        assert other.usage_metadata == whole.usage_metadata
        assert other.response_metadata.keys() == whole.response_metadata.keys()


def test_what_reuse_did_is_in_usage_and_metadata():
    numbers = {"num_hits": 3, "num_misses": 1, "num_reused_tokens": 70, "num_stored_tokens": 20}
    model = scripted_chat(answer("yes", num_computed_tokens=30, ttft_seconds=0.25, **numbers))
    for message in (model.invoke("Hello"), list(model.stream("Hello"))[-1]):
        assert message.usage_metadata["input_tokens"] == 100
        assert message.usage_metadata["input_token_details"] == {"cache_read": 70, "cache_creation": 20}
        metadata = message.response_metadata
        assert (metadata["num_hits"], metadata["num_misses"], metadata["ttft_seconds"]) == (3, 1, 0.25)
        assert metadata["model_name"] == "scripted"


def test_tokens_are_counted_by_the_models_own_tokenizer(chat, llm):
    assert chat.get_token_ids("häuser") == list(chat.tokenizer("häuser")["input_ids"])
    assert chat.get_num_tokens("häuser") == llm.get_num_tokens("häuser") == 7  # a token a byte


@pytest.mark.parametrize(
    ("constructed", "called", "expected"),
    [
        ({}, {}, {"do_sample": False}),
        ({"temperature": 0}, {}, {"do_sample": False}),
        ({"temperature": 0.5}, {}, {"do_sample": True, "temperature": 0.5}),
        ({"temperature": 0.5}, {"temperature": 0}, {"do_sample": False}),
        (
            {"temperature": 0},
            {"temperature": 0.7, "top_p": 0.9},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        ),
        ({"top_k": 5}, {}, {"do_sample": True, "top_k": 5}),
        ({"temperature": 0, "top_p": 0.9}, {}, {"do_sample": False}),
        ({"model_kwargs": {"repetition_penalty": 1.2}}, {}, {"do_sample": False, "repetition_penalty": 1.2}),
        ({"max_tokens": 9}, {"max_tokens": 4}, {"do_sample": False, "max_new_tokens": 4}),
        ({"stop": ["a"]}, {}, {"do_sample": False, "stop_strings": ["a"]}),
        ({"stop": ["a"]}, {"stop": ["b", "c"]}, {"do_sample": False, "stop_strings": ["b", "c"]}),
        ({"stop": ["a"]}, {"stop": []}, {"do_sample": False}),
        ({"policy": "block"}, {"policy": "full"}, {"do_sample": False, "policy": "full"}),
    ],
)
def test_options_of_a_call_go_before_those_of_the_constructor(constructed, called, expected):
    model = scripted_chat(**constructed)
    model.invoke("Hello", **called)
    defaults = {"max_new_tokens": 256, "policy": "auto"}
    assert last_asked(model)[1] == {**defaults, **expected}


def test_stop_strings_end_an_answer(chat):
    whole = chat.invoke("Hello").content
    stop = whole[3]
    assert chat.invoke("Hello", stop=[stop]).content == whole[: whole.index(stop)]
    assert "".join(piece.content for piece in chat.stream("Hello", stop=[stop])) == whole[: whole.index(stop)]


def test_a_stream_that_nobody_reads_on_is_closed():
    model = scripted_chat(answer("one two three"))
    stream = model.stream("Hello")
    next(stream)
    stream.close()
    assert model.engine.num_closed == 1

    async def read_one():
        stream = model.astream("Hello")
        await anext(stream)
        await stream.aclose()

    asyncio.run(read_one())
    assert model.engine.num_closed == 2


def test_a_traced_model_has_a_name_and_a_provider(chat, llm):
    for model, kind in ((chat, "chat"), (llm, "llm")):
        params = model._get_ls_params(stop=["x"])
        assert params["ls_provider"] == "rag_blockcache"
        assert params["ls_model_name"] == "LlamaForCausalLM"
        assert (params["ls_model_type"], params["ls_max_tokens"], params["ls_stop"]) == (kind, 12, ["x"])


# Messages


def test_messages_keep_roles_names_calls_and_results():
    call = {"name": "add", "args": {"a": 1}, "id": "call-1", "type": "tool_call"}
    translated = chat_messages(
        [
            SystemMessage("Be brief."),
            HumanMessage("Add.", name="ada"),
            AIMessage(
                [{"type": "text", "text": "So: "}, {"type": "tool_use", "id": "x"}, "wait"], tool_calls=[call]
            ),
            ToolMessage("1", name="add", tool_call_id="call-1"),
            FunctionMessage(name="add", content="1"),
            ChatMessage(role="critic", content="Hm."),
        ]
    )
    function = {"type": "function", "id": "call-1", "function": {"name": "add", "arguments": {"a": 1}}}
    assert translated == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.", "name": "ada"},
        {"role": "assistant", "content": "So: wait", "tool_calls": [function]},
        {"role": "tool", "content": "1", "name": "add", "tool_call_id": "call-1"},
        {"role": "tool", "content": "1", "name": "add"},
        {"role": "critic", "content": "Hm."},
    ]


def test_thoughts_of_an_assistant_are_not_shown_again():
    message = AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "Yes."}])
    assert chat_messages([message])[0]["content"] == "Yes."


def test_plain_text_blocks_are_paragraphs_of_their_own_and_known_as_passages():
    blocks = [
        {"type": "text", "text": "Read "},
        {"type": "text", "text": "this:"},
        create_plaintext_block(text=TEXTS[0], title="Lighthouse", context="From the chronicle."),
        create_plaintext_block(text=TEXTS[1]),
        {"type": "text", "text": QUESTION},
    ]
    message = HumanMessage(content_blocks=blocks)
    shown = ["Read this:", f"Lighthouse\nFrom the chronicle.\n{TEXTS[0]}", TEXTS[1], QUESTION]
    assert chat_messages([message])[0]["content"] == "\n\n".join(shown)
    assert shown_texts([message]) == TEXTS[:2]


def test_the_documents_of_an_artifact_are_known_as_passages():
    message = ToolMessage(joined(DOCUMENTS), tool_call_id="x", artifact=DOCUMENTS)
    other = ToolMessage("5", tool_call_id="y", artifact={"sum": 5})
    single = ToolMessage(TEXTS[2], tool_call_id="z", artifact=DOCUMENTS[2])
    assert shown_texts([message, other, single]) == [*TEXTS, TEXTS[2]]


@pytest.mark.parametrize(
    "message",
    [
        HumanMessage([{"type": "image", "url": "https://example.com/cat.png"}]),
        HumanMessage(
            [{"type": "text-plain", "url": "https://example.com/cat.txt", "mime_type": "text/plain"}]
        ),
        RemoveMessage(id="x"),
    ],
)
def test_what_no_text_model_can_read_is_refused(message):
    with pytest.raises(InvalidInputError, match="cannot be"):
        chat_messages([message])


def test_documents_become_passages():
    given = [
        Document("Text.", metadata={"title": "Title"}, id="7"),
        "Text.",
        Passage("Own."),
        Document(" "),
        "",
    ]
    assert passages(given) == [
        Passage("Text.", title="Title", passage_id="7"),
        Passage("Text."),
        Passage("Own."),
    ]
    with pytest.raises(InvalidInputError, match="int"):
        passages([5])


# Passages


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


# Batches


def test_a_batch_is_one_batch_of_the_engine(chat, monkeypatch):
    questions = [f"Question {'x' * n}" for n in range(5)]
    one_by_one = [chat.invoke(question).content for question in questions]
    sizes = []
    batched = type(chat.engine).answer_batch

    def counted(self, requests, **options):
        sizes.append(len(requests))
        return batched(self, requests, **options)

    monkeypatch.setattr(type(chat.engine), "answer_batch", counted)
    assert [message.content for message in chat.batch(questions)] == one_by_one
    assert [message.content for message in asyncio.run(chat.abatch(questions))] == one_by_one
    messages = [[HumanMessage(question)] for question in questions]
    assert [row[0].text for row in chat.generate(messages).generations] == one_by_one
    assert [row[0].text for row in asyncio.run(chat.agenerate(messages)).generations] == one_by_one
    assert sizes == [5] * 4


def test_an_llm_answers_a_batch_at_once(llm, monkeypatch):
    prompts = [f"Prompt {'x' * n}" for n in range(5)]
    one_by_one = [llm.invoke(prompt) for prompt in prompts]
    assert all(one_by_one)
    sizes = []
    batched = type(llm.engine).answer_batch

    def counted(self, requests, **options):
        sizes.append(len(requests))
        return batched(self, requests, **options)

    monkeypatch.setattr(type(llm.engine), "answer_batch", counted)
    assert llm.batch(prompts) == one_by_one
    assert asyncio.run(llm.abatch(prompts)) == one_by_one
    assert [row[0].text for row in llm.generate(prompts).generations] == one_by_one
    assert [row[0].text for row in asyncio.run(llm.agenerate(prompts)).generations] == one_by_one
    assert sizes == [5] * 4


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


# Tools


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return f"sunny in {city}"


@tool
def time_of(city: str) -> str:
    """Return the time in a city."""
    return f"noon in {city}"


TOOLS = function_tools([weather, time_of])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("none", "none"),
        (False, "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("weather", "weather"),
        ({"type": "function", "function": {"name": "time_of"}}, "time_of"),
        ({"type": "tool", "name": "weather"}, "weather"),
        ({"type": "any"}, "required"),
        ({"type": "auto"}, "auto"),
    ],
)
def test_every_form_of_a_choice_is_understood(choice, expected):
    model = scripted_chat()
    model.bind_tools([weather, time_of], tool_choice=choice).invoke("Hello")
    model.bind(tools=[weather, time_of], tool_choice=choice).invoke("Hello")
    for request, _ in model.engine.asked:
        assert request.tool_choice == expected
        assert [each["function"]["name"] for each in request.tools] == ["weather", "time_of"]


def test_a_choice_that_is_no_tool_is_refused():
    with pytest.raises(InvalidInputError, match=r"'wether'; use the name of a tool \(weather, time_of\)"):
        choice_of_tool("wether", TOOLS)
    with pytest.raises(InvalidInputError, match="there are no tools"):
        scripted_chat().bind_tools([], tool_choice="any")


def test_tools_that_run_elsewhere_are_refused():
    with pytest.raises(InvalidInputError, match="web_search"):
        scripted_chat().bind_tools([{"type": "web_search"}])


def test_calls_of_tools_are_in_the_message_and_in_the_last_chunk():
    model = scripted_chat(answer("Let me see.", ("weather", {"city": "Köln"}), ("time_of", {"city": "Rom"})))
    bound = model.bind_tools([weather, time_of])
    pieces = list(bound.stream("Hello"))
    for message in (bound.invoke("Hello"), sum(pieces[1:], pieces[0])):
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [
            ("weather", {"city": "Köln"}),
            ("time_of", {"city": "Rom"}),
        ]
        assert len({call["id"] for call in message.tool_calls}) == 2
        assert message.response_metadata["finish_reason"] == "tool_calls"
    one_call = model.bind_tools([weather, time_of], parallel_tool_calls=False)
    for message in (one_call.invoke("Hello"), list(one_call.stream("Hello"))[-1]):
        assert [call["name"] for call in message.tool_calls] == ["weather"]


# Structured output


class Joke(BaseModel):
    """A joke."""

    setup: str = Field(description="question")
    punchline: str = Field(description="answer")


class JokeDict(TypedDict):
    """A joke."""

    setup: str
    punchline: str


JOKE = {"setup": "Why?", "punchline": "Because."}
JOKE_JSON = '{"setup": "Why?", "punchline": "Because."}'
SCHEMAS = [(Joke, Joke(**JOKE)), (JokeDict, JOKE), (Joke.model_json_schema(), JOKE)]


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize(("schema", "expected"), SCHEMAS, ids=["pydantic", "typeddict", "json-schema"])
def test_structured_output_is_an_object_of_the_schema(schema, expected, method, strict):
    name = "JokeDict" if schema is JokeDict else "Joke"
    given = answer("", (name, JOKE)) if method == "function_calling" else answer(JOKE_JSON)
    model = scripted_chat(given)
    structured = model.with_structured_output(schema, method=method, strict=strict)
    assert structured.invoke("Tell one.") == expected
    assert list(structured.stream("Tell one."))[-1] == expected
    request, _ = last_asked(model)
    if method == "function_calling":
        assert (request.tool_choice, request.response_schema) == (name, None)
        parameters = request.tools[0]["function"]["parameters"]
    else:
        assert request.tools == []
        parameters = request.response_schema
    assert set(parameters["properties"]) == {"setup", "punchline"}
    assert parameters.get("additionalProperties") == (False if strict else None)


def test_what_was_said_is_included_if_asked_for():
    good, bad = (
        scripted_chat(answer(text)).with_structured_output(Joke, include_raw=True)
        for text in (JOKE_JSON, "no joke")
    )
    found = good.invoke("Tell one.")
    assert (found["parsed"], found["parsing_error"], found["raw"].content) == (Joke(**JOKE), None, JOKE_JSON)
    found = bad.invoke("Tell one.")
    assert (found["parsed"], found["raw"].content) == (None, "no joke")
    assert found["parsing_error"] is not None


def test_json_mode_needs_no_schema():
    model = scripted_chat(answer(JOKE_JSON))
    assert model.with_structured_output(method="json_mode").invoke("Tell one.") == JOKE
    assert last_asked(model)[0].response_schema == {"type": "object"}
    with pytest.raises(InvalidInputError, match="needs a schema"):
        model.with_structured_output()
    with pytest.raises(InvalidInputError, match="'yaml'"):
        model.with_structured_output(Joke, method="yaml")


def test_response_formats_of_other_providers_are_understood():
    schema = Joke.model_json_schema()
    assert (
        response_schema({"type": "json_schema", "json_schema": {"name": "Joke", "schema": schema}}) == schema
    )
    assert response_schema(schema) == schema
    assert response_schema(Joke)["properties"].keys() == {"setup", "punchline"}
    assert response_schema({"type": "json_object"}) == {"type": "object"}
    assert response_schema({"type": "text"}) is response_schema(None) is None


# The LLM


def test_an_llm_continues_the_prompt_as_it_stands(llm):
    expected = llm.engine.answer(Text("Once upon"), max_new_tokens=12, policy="block", do_sample=False)
    result = llm.generate(["Once upon"])
    assert result.generations[0][0].text == expected.text == "".join(llm.stream("Once upon"))
    info = result.generations[0][0].generation_info
    assert info["usage_metadata"]["input_tokens"] == len("Once upon")
    assert info["finish_reason"] == expected.finish_reason
    assert result.llm_output == {"model_name": "LlamaForCausalLM"}

    async def streamed():
        return "".join(await all_of(llm.astream("Once upon")))

    assert asyncio.run(streamed()) == asyncio.run(llm.ainvoke("Once upon")) == expected.text


def test_an_llm_reuses_documents_too(llm):
    for num_hits in (0, 3):
        info = llm.generate([QUESTION], documents=DOCUMENTS).generations[0][0].generation_info
        assert info["num_hits"] == num_hits


def test_an_llm_takes_the_arguments_of_a_hugging_face_pipeline(tmp_path):
    llm = BlockCacheLLM.from_model_id(
        "some/model",
        "text-generation",
        device=-1,
        model_kwargs={"torch_dtype": "bfloat16"},
        pipeline_kwargs={"max_new_tokens": 10, "temperature": 0.5, "return_full_text": False},
        cache_dir=tmp_path,
    )
    assert (llm.model, llm.device, llm.dtype, llm.batch_size) == ("some/model", "cpu", "bfloat16", 4)
    scripted(llm, answer("yes")).invoke("Hello")
    expected = {"max_new_tokens": 10, "temperature": 0.5, "do_sample": True, "policy": "auto"}
    assert last_asked(llm)[1] == expected
    llm.invoke("Hello", pipeline_kwargs={"max_new_tokens": 3}, temperature=0)
    assert last_asked(llm)[1] == {"max_new_tokens": 3, "do_sample": False, "policy": "auto"}
    assert BlockCacheLLM.from_model_id("some/model", device=1).device == "cuda:1"
    assert BlockCacheLLM.from_model_id("some/model", device_map="auto").device == "auto"


@pytest.mark.parametrize(
    "options",
    [
        {"task": "summarization"},
        {"backend": "openvino"},
        {"model_kwargs": {"trust_remote_code": True}},
        {"pipeline_kwargs": {"return_full_text": True}},
    ],
)
def test_arguments_of_a_pipeline_that_mean_nothing_here_are_refused(options):
    with pytest.raises(InvalidInputError):
        BlockCacheLLM.from_model_id("some/model", **options)


# Concurrency


class Slow(LogitsProcessor):
    """Takes its time over every token, so that whoever waits for an answer is seen to wait."""

    def __call__(self, input_ids, scores):
        time.sleep(0.02)
        return scores


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
    slow = chat.bind(logits_processor=LogitsProcessorList([Slow()]))

    async def streamed(question):
        return sum([piece async for piece in slow.astream(question)], AIMessageChunk(content=""))

    async def ask_all():
        if asks == "abatch":
            return await slow.abatch(questions)
        return await asyncio.gather(*map(slow.ainvoke if asks == "ainvoke" else streamed, questions))

    stalls = []
    for _ in range(3):  # another process may keep the CPU once
        answers, stall = asyncio.run(longest_stall(ask_all()))
        assert [message.content for message in answers] == one_by_one
        stalls.append(stall)
    assert min(stalls) < 0.05, "an answer of a quarter of a second did not keep the loop"

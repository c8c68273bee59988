"""ChatBlockCache and BlockCacheLLM translate, and change nothing: the engine gets what LangChain was told."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
from typing import Literal

import pytest

pytest.importorskip("langchain_core")

from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.content import create_plaintext_block
from langchain_core.tools import tool
from langchain_parts import (
    DOCUMENTS,
    TEXTS,
    all_of,
    answer,
    joined,
    last_asked,
    scripted,
    scripted_chat,
)
from pydantic import BaseModel, Field, ValidationError
from rag_blockcache.integrations.langchain import BlockCacheLLM, ChatBlockCache
from rag_blockcache.integrations.langchain.messages import chat_messages, passages, shown_texts
from rag_blockcache.integrations.langchain.tools import choice_of_tool, function_tools, response_schema
from typing_extensions import TypedDict

from rag_blockcache import Chat, Passage, Text
from rag_blockcache.errors import InvalidInputError

pytest_plugins = ["langchain_fixtures"]

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


def test_a_copied_model_shares_engine_and_weights(chat, llm):
    for model in (chat, llm):
        engine = model.engine
        for again in (copy.copy(model), copy.deepcopy(model), model.model_copy(deep=True)):
            assert (again.model, again.tokenizer) == (model.model, model.tokenizer)
            assert again.engine is engine
        copy.deepcopy({"model": model})["model"].model_kwargs["num_beams"] = 2
        assert model.model_kwargs == {}
    assert copy.deepcopy(chat).invoke("Hello").content == chat.invoke("Hello").content


def test_a_model_that_is_named_goes_to_other_processes(tiny_model_path):
    model = ChatBlockCache(model=str(tiny_model_path), max_tokens=3)
    assert model.engine == pickle.loads(pickle.dumps(model)).engine


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


def test_a_call_may_say_whether_it_streams(chat):
    assert chat.invoke("Hello", stream=True).content == chat.invoke("Hello", stream=False).content


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
        {"type": "text", "text": "When?"},
    ]
    message = HumanMessage(content_blocks=blocks)
    shown = ["Read this:", f"Lighthouse\nFrom the chronicle.\n{TEXTS[0]}", TEXTS[1], "When?"]
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
    named, own = Document("Text.", metadata={"title": "Title"}, id="7"), Passage("Own.")
    expected = [Passage("Text.", passage_id="7"), Passage("Text."), own]
    assert passages([named, "Text.", own, Document(" "), ""]) == expected
    with pytest.raises(InvalidInputError, match="int"):
        passages([5])


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
        assert "parallel_tool_calls" not in last_asked(model)[1]


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


class Verdict(BaseModel):
    """What somebody thinks."""

    is_good: bool
    reason: Literal["size", "price"]


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_even_random_weights_keep_to_a_schema(chat, method):
    structured = chat.with_structured_output(Verdict, method=method)
    verdicts = [
        structured.invoke("Well?", max_tokens=100),
        list(structured.stream("Well?", max_tokens=100))[-1],
        asyncio.run(structured.ainvoke("Well?", max_tokens=100)),
        *structured.batch(["Well?", "And then?"], max_tokens=100),
    ]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)


def test_even_random_weights_call_the_tool_that_they_must(chat):
    caller = chat.bind_tools([weather, Verdict], tool_choice="Verdict").bind(max_tokens=100)
    first, *rest = caller.stream("Well?")
    for message in (caller.invoke("Well?"), sum(rest, first)):
        assert [call["name"] for call in message.tool_calls] == ["Verdict"]
        Verdict(**message.tool_calls[0]["args"])


def test_an_agent_gives_a_structured_response(chat):
    agents = pytest.importorskip("langchain.agents")
    agent = agents.create_agent(chat.model_copy(update={"max_tokens": 100}), [], response_format=Verdict)
    assert isinstance(agent.invoke({"messages": [("human", "Well?")]})["structured_response"], Verdict)


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
    with pytest.raises(InvalidInputError, match="yaml"):
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
        info = llm.generate(["When?"], documents=DOCUMENTS).generations[0][0].generation_info
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

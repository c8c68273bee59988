"""Tools and structured predictions through LlamaIndex's own methods.

The model has random weights, so calls are forced and lengths bounded; whatever it writes must then be valid.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Literal

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from conftest import byte_tokenizer
from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.program.utils import process_streaming_objects
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index_instrumentation import get_dispatcher
from llama_index_pipelines import (
    STORIES,
    Setup,
    own_settings,
    recorded,
    stories,
    tiny_llm,
)
from pydantic import BaseModel, Field
from rag_blockcache.integrations.llama_index import BlockCacheLLM

from rag_blockcache import SharedCache, Text
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.tool_calls import ToolCall

pytestmark = pytest.mark.usefixtures(own_settings.__name__)

PROMPT = PromptTemplate("Tell of {it}.")


class Tide(BaseModel):
    """The state of the sea."""

    level: Literal["high", "low"]
    metres: int = Field(ge=0, le=9)


class Ship(BaseModel):
    """A ship in the harbour."""

    kind: Literal["ferry", "sled"]


def ship(kind: str) -> str:
    """Call a ship."""
    return f"a {kind} comes"


def tide(level: str, metres: int) -> str:
    """Note the tide."""
    return f"{level} {metres}"


TOOLS = [
    FunctionTool.from_defaults(ship, fn_schema=Ship),
    FunctionTool.from_defaults(tide, fn_schema=Tide),
]


@pytest.fixture
def llm() -> BlockCacheLLM:
    return tiny_llm(max_new_tokens=300, uses_hints=False)


# Tools


def test_a_required_call_is_made_and_carried_out(llm):
    response = llm.predict_and_call(TOOLS, "Which ship?", tool_required=True)
    (source,) = response.sources
    assert not source.is_error
    assert source.tool_name in ("ship", "tide")


@pytest.mark.parametrize("tool_choice", ["tide", {"type": "function", "function": {"name": "tide"}}])
def test_a_tool_can_be_chosen_by_name(llm, tool_choice):
    response = llm.chat_with_tools(TOOLS, "Which tide?", tool_choice=tool_choice)
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "tide"
    assert Tide.model_validate(call.tool_kwargs)
    (block,) = response.message.blocks
    assert block.tool_call_id == call.tool_id
    assert response.raw["finish_reason"] == "tool_calls"


def test_the_last_response_of_a_stream_has_the_calls(llm):
    responses = list(llm.stream_chat_with_tools(TOOLS, "Which ship?", tool_choice="ship"))
    calls = [llm.get_tool_calls_from_response(each, error_on_no_tool_call=False) for each in responses]
    assert calls[:-1] == [[]] * (len(responses) - 1)
    assert [call.tool_name for call in calls[-1]] == ["ship"]
    assert not responses[-1].message.content
    # LlamaIndex's programs read them in another place than its agents do.
    assert isinstance(process_streaming_objects(responses[-1], Ship, llm=llm), Ship)


def test_asynchronous_methods_call_tools_as_the_others(llm):
    async def ask():
        called = await llm.apredict_and_call(TOOLS, "Which ship?", tool_choice="ship")
        stream = await llm.astream_chat_with_tools(TOOLS, "Which ship?", tool_choice="ship")
        return called, [response async for response in stream][-1]

    called, last = asyncio.run(ask())
    assert called.response in ("a ferry comes", "a sled comes")
    assert [call.tool_name for call in llm.get_tool_calls_from_response(last)] == ["ship"]


@pytest.mark.parametrize(("is_parallel", "num_calls"), [(True, 2), (False, 1)])
def test_calls_at_the_same_time_are_passed_on_where_they_are_allowed(
    llm, monkeypatch, is_parallel, num_calls
):
    calls = tuple(ToolCall("ship", {"kind": kind}, f"call{kind:>5}") for kind in ("ferry", "sled"))
    answer = dataclasses.replace(llm.engine.answer(Text("?"), max_new_tokens=1), tool_calls=calls)
    monkeypatch.setattr(SharedCache, "answer", lambda *_, **__: answer)
    response = llm.chat_with_tools(TOOLS, "Which ships?", allow_parallel_tool_calls=is_parallel)
    assert len(llm.get_tool_calls_from_response(response)) == num_calls


def test_an_answer_without_a_call_is_an_error_where_one_was_expected(llm):
    response = llm.chat_with_tools(TOOLS, "Which ship?", tool_choice="none", max_tokens=5)
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(response)


def test_a_call_and_its_result_go_back_to_the_model(llm):
    asked = ChatMessage("Which ship?")
    called = llm.chat_with_tools(TOOLS, asked, tool_choice="ship").message
    call = next(block for block in called.blocks if isinstance(block, ToolCallBlock))
    result = ChatMessage("a ferry comes", role="tool", additional_kwargs={"tool_call_id": call.tool_call_id})
    response = llm.chat_with_tools(TOOLS, chat_history=[asked, called, result], max_tokens=5)
    short = llm.chat_with_tools(TOOLS, chat_history=[asked], max_tokens=5)
    more = response.raw["usage"]["prompt_tokens"] - short.raw["usage"]["prompt_tokens"]
    assert more > len(json.dumps(call.tool_kwargs)) + len("a ferry comes")


def test_a_messages_to_prompt_of_the_user_has_no_place_for_tools():
    llm = tiny_llm(messages_to_prompt=lambda messages: "...")
    with pytest.raises(InvalidInputError, match="messages_to_prompt has no place for tools"):
        llm.chat_with_tools(TOOLS, "Which ship?")
    assert llm.chat_with_tools(TOOLS, "Which ship?", tool_choice="none", max_tokens=2).raw


# Structured predictions


class Events(BaseEventHandler):
    """Counts events of structured predictions."""

    names: list[str] = Field(default_factory=list)

    def handle(self, event, **kwargs):
        kinds = (
            LLMStructuredPredictStartEvent,
            LLMStructuredPredictInProgressEvent,
            LLMStructuredPredictEndEvent,
        )
        if isinstance(event, kinds):
            self.names.append(event.class_name())


@pytest.fixture
def events():
    handler = Events()
    get_dispatcher().event_handlers.append(handler)
    yield handler.names
    get_dispatcher().event_handlers.remove(handler)


@pytest.fixture(params=["a chat model", "a base model"])
def any_llm(request, llm) -> BlockCacheLLM:
    if request.param == "a chat model":
        return llm
    return tiny_llm(max_new_tokens=300, uses_hints=False, tokenizer=byte_tokenizer(chat_template=None))


def test_a_prediction_has_the_class_that_was_asked_for(any_llm, events):
    assert isinstance(any_llm.structured_predict(Tide, PROMPT, it="the sea"), Tide)
    assert events == ["LLMStructuredPredictStartEvent", "LLMStructuredPredictEndEvent"]


def test_the_model_is_shown_the_schema(any_llm):
    with recorded() as calls:
        any_llm.structured_predict(Tide, PROMPT, it="the sea")
    assert "Tell of the sea." in calls[0].prompt
    assert json.dumps(Tide.model_json_schema()) in calls[0].prompt


def test_a_system_prompt_stands_before_a_structured_prediction(llm):
    llm.system_prompt = "You are brief."
    with recorded() as calls:
        llm.structured_predict(Tide, PROMPT, it="the sea")
    assert calls[0].prompt.startswith("You are brief.\nTell of the sea.")


def test_a_streamed_prediction_fills_up(any_llm, events):
    *partial, last = any_llm.stream_structured_predict(Tide, PROMPT, it="the sea")
    assert Tide.model_validate(last.model_dump()) == any_llm.structured_predict(Tide, PROMPT, it="the sea")
    assert len(partial) > 1
    assert partial[0] != last
    assert "LLMStructuredPredictInProgressEvent" in events


def test_asynchronous_predictions_are_those_of_the_others(any_llm):
    async def predict():
        stream = await any_llm.astream_structured_predict(Tide, PROMPT, it="the sea")
        last = [each async for each in stream][-1]
        return await any_llm.astructured_predict(Tide, PROMPT, it="the sea"), last

    whole, last = asyncio.run(predict())
    assert whole == any_llm.structured_predict(Tide, PROMPT, it="the sea")
    assert Tide.model_validate(last.model_dump()) == whole


def test_another_program_mode_takes_llama_indexs_own_program():
    llm = tiny_llm(max_new_tokens=300, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    with recorded() as calls:
        assert isinstance(llm.structured_predict(Tide, PROMPT, it="the sea"), Tide)
    assert calls[0].counts["finish_reason"] == "tool_calls"


def test_a_structured_llm_answers_queries_with_objects_and_reuses_passages():
    llm = tiny_llm(max_new_tokens=300, salt="structured")
    setup = Setup(llm, stories())
    llm.engine.get().prefill([node.get_content("llm") for node in setup.nodes])
    engine = setup.index.as_query_engine(llm=llm.as_structured_llm(Tide), similarity_top_k=3)
    with recorded() as calls:
        response = engine.query("What is the tide?")
    assert isinstance(response.response, Tide)
    assert calls[0].counts["num_hits"] == len(STORIES)


def test_an_answer_can_follow_a_schema_given_in_the_call(llm):
    answer = llm.complete("The tide:", response_schema=Tide.model_json_schema()).text
    assert Tide.model_validate_json(answer)

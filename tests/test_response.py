"""Answers that must have a form: JSON by a schema, calls of tools, alone, in batches and in streams."""

from __future__ import annotations

import json

import pytest
from test_request import MILL
from transformers import LogitsProcessor, LogitsProcessorList

from rag_blockcache import Chat, Question, Text
from rag_blockcache.errors import InvalidInputError

SCHEMA = {
    "type": "object",
    "properties": {"is_true": {"type": "boolean"}, "place": {"enum": ["here", "there"]}},
    "required": ["is_true", "place"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "Finds.", "parameters": SCHEMA},
    }
    for name in ("look_up", "look_down")
]
ASKED = [{"role": "user", "content": f"{MILL} Is it so?"}]


class Writes(LogitsProcessor):
    """Makes a model write given text, then end."""

    def __init__(self, tokenizer, text):
        self.token_ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        self.width = None

    def __call__(self, input_ids, scores):
        self.width = self.width or input_ids.shape[1]
        forced = self.token_ids[min(input_ids.shape[1] - self.width, len(self.token_ids) - 1)]
        scores[:] = float("-inf")
        scores[:, forced] = 0.0
        return scores


def writes(cache, text):
    return LogitsProcessorList([Writes(cache.tokenizer, text)])


def is_met(text):
    value = json.loads(text)
    return set(value) == {"is_true", "place"} and value["place"] in ("here", "there")


@pytest.mark.parametrize(
    "request_", [Chat(ASKED, response_schema=SCHEMA), Text("Is it so?", response_schema=SCHEMA)]
)
def test_an_answer_follows_its_schema(request_, tiny_cache):
    answer = tiny_cache.answer(request_, max_new_tokens=80)
    assert is_met(answer.text)
    assert (answer.finish_reason, answer.tool_calls) == ("stop", ())


@pytest.mark.parametrize(
    ("choice", "names"), [("look_down", {"look_down"}), ("required", {"look_up", "look_down"})]
)
def test_a_tool_that_must_be_called_is_called(choice, names, tiny_cache):
    answer = tiny_cache.answer(Chat(ASKED, tools=TOOLS, tool_choice=choice), max_new_tokens=200)
    assert answer.finish_reason == "tool_calls"
    assert {call.name for call in answer.tool_calls} <= names
    assert all(is_met(json.dumps(call.arguments)) for call in answer.tool_calls)
    assert answer.text == ""


def test_rows_of_a_batch_have_each_their_own_form(tiny_cache):
    requests = [
        Chat(ASKED, response_schema=SCHEMA),
        Question("Is it so?", [MILL]),
        Chat(ASKED, tools=TOOLS, tool_choice="look_up"),
    ]
    together = tiny_cache.answer_batch(requests, max_new_tokens=120, policy="block")
    alone = [tiny_cache.answer(request, max_new_tokens=120, policy="block") for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert is_met(together[0].text)
    assert together[2].tool_calls[0].name == "look_up"


def test_the_users_processors_are_asked_too(tiny_cache):
    forced = '{"is_true": true, "place": "there"}'
    answer = tiny_cache.answer(
        Chat(ASKED, response_schema=SCHEMA), max_new_tokens=80, logits_processor=writes(tiny_cache, forced)
    )
    assert answer.text == forced


WRITTEN = 'Let me see.\n<tool_call>\n{"name": "look_up", "arguments": {"place": "here"}}\n</tool_call>'


def test_calls_are_read_and_are_no_text(tiny_cache):
    answer = tiny_cache.answer(
        Chat(ASKED, tools=TOOLS), max_new_tokens=200, logits_processor=writes(tiny_cache, WRITTEN)
    )
    [call] = answer.tool_calls
    assert (call.name, call.arguments) == ("look_up", {"place": "here"})
    assert (answer.text, answer.finish_reason) == ("Let me see.", "tool_calls")


def test_a_stream_shows_no_call(tiny_cache):
    stream = tiny_cache.stream_answer(
        Chat(ASKED, tools=TOOLS), max_new_tokens=200, logits_processor=writes(tiny_cache, WRITTEN)
    )
    assert "".join(stream) == "Let me see."
    assert [call.name for call in stream.answer.tool_calls] == ["look_up"]


@pytest.mark.parametrize("chat", [Chat(ASKED), Chat(ASKED, tools=TOOLS, tool_choice="none")])
def test_without_tools_what_looks_like_a_call_is_text(chat, tiny_cache):
    options = {"max_new_tokens": 200, "logits_processor": writes(tiny_cache, WRITTEN)}
    answer = tiny_cache.answer(chat, **options)
    assert (answer.text, answer.tool_calls, answer.finish_reason) == (WRITTEN, (), "stop")
    options["logits_processor"] = writes(tiny_cache, WRITTEN)
    assert "".join(tiny_cache.stream_answer(chat, **options)) == WRITTEN


def test_tools_are_shown_unless_none_may_be_called(tiny_cache):
    def prompt(choice):
        segments = tiny_cache.segments(Chat(ASKED, tools=TOOLS, tool_choice=choice))
        return tiny_cache.tokenizer.decode([token for segment in segments for token in segment])

    assert "look_down" in prompt("auto")
    assert "look_down" in prompt("look_up")
    assert "look_down" not in prompt("none")


def test_a_tool_that_is_not_there_cannot_be_chosen(tiny_cache):
    with pytest.raises(InvalidInputError, match="tool_choice is 'look_in'"):
        tiny_cache.answer(Chat(ASKED, tools=TOOLS, tool_choice="look_in"))


def test_an_answer_that_is_cut_is_not_a_call(tiny_cache):
    chat = Chat(ASKED, tools=TOOLS, tool_choice="look_up")
    answer = tiny_cache.answer(chat, max_new_tokens=20)
    assert (answer.tool_calls, answer.finish_reason) == ((), "length")

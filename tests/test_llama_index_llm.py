"""``BlockCacheLLM`` gives what LlamaIndex expects of an LLM: answers, streams, events, tools, structure."""

from __future__ import annotations

import asyncio
import copy
import doctest
import importlib
import pickle
import sys
import threading
import time

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

import torch
from conftest import byte_tokenizer
from llama_index.core import Settings
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms import LLM
from llama_index.core.prompts import PromptTemplate
from llama_index_pipelines import (
    STORIES,
    TINY_MODEL,
    TINY_TOKENIZER,
    Setup,
    own_settings,
    recorded,
    stories,
    tiny_llm,
)
from pydantic import ValidationError
from rag_blockcache.integrations.llama_index import BlockCacheLLM, BlockPromptHelper
from rag_blockcache.integrations.llama_index.messages import cited_texts, template_messages
from rag_blockcache.integrations.llama_index.options import call_options
from test_block_cache import Slow
from transformers import LogitsProcessorList

from rag_blockcache.errors import InvalidInputError, MissingDependencyError

pytestmark = pytest.mark.usefixtures(own_settings.__name__)

ASKED = [ChatMessage("You are brief.", role="system"), ChatMessage("When was it built?")]
LIGHTHOUSE = STORIES["lighthouse.txt"]


def generated(prompt: str, num_tokens: int = 16, model=TINY_MODEL, **options) -> str:
    """Return what transformers itself makes of a rendered prompt."""
    token_ids = torch.tensor([TINY_TOKENIZER.encode(prompt, add_special_tokens=False)])
    with torch.inference_mode():
        made = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    text = TINY_TOKENIZER.decode(made[0, token_ids.shape[1] :], skip_special_tokens=True)
    return text.rstrip("\ufffd")  # a character that was cut off within its bytes


def rendered(messages: list[ChatMessage]) -> str:
    plain = [{"role": message.role.value, "content": message.content} for message in messages]
    return TINY_TOKENIZER.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)


def full_llm(**options) -> BlockCacheLLM:
    return tiny_llm(policy="full", **options)


# Prompts


def test_a_chat_is_answered_as_transformers_does():
    response = full_llm().chat(ASKED)
    assert response.message.role == MessageRole.ASSISTANT
    assert response.message.content.rstrip("\ufffd") == generated(rendered(ASKED))


def test_a_prompt_that_is_not_formatted_becomes_a_message_of_the_user():
    llm = full_llm(system_prompt="You are brief.")
    assert llm.complete("When was it built?").text.rstrip("\ufffd") == generated(rendered(ASKED))


def test_a_formatted_prompt_is_continued_as_it_stands():
    assert full_llm().complete("Built in", formatted=True).text.rstrip("\ufffd") == generated("Built in")


def test_a_query_wrapper_prompt_is_put_around_a_prompt():
    llm = full_llm(query_wrapper_prompt="Q: {query_str}", is_chat_model=False)
    assert llm.complete("When?").text.rstrip("\ufffd") == generated("Q: When?")


def test_a_completion_to_prompt_of_the_user_is_used():
    llm = full_llm(completion_to_prompt=lambda prompt: f"<{prompt}>", query_wrapper_prompt="Q: {query_str}")
    assert llm.complete("When?").text.rstrip("\ufffd") == generated("<Q: When?>")


def test_a_messages_to_prompt_of_the_user_is_used():
    llm = full_llm(messages_to_prompt=lambda messages: "/".join(each.content for each in messages))
    assert llm.chat(ASKED).message.content.rstrip("\ufffd") == generated("You are brief./When was it built?")


def test_a_model_without_a_chat_template_gets_its_prompts_as_text():
    llm = full_llm(tokenizer=byte_tokenizer(chat_template=None), system_prompt="Be brief.")
    assert not llm.metadata.is_chat_model
    with recorded() as calls:
        answer = llm.predict(PromptTemplate("About {it}:"), it="ice")
    assert calls[0].prompt == "Be brief.\n\nAbout ice:"
    assert answer.rstrip("\ufffd") == generated("Be brief.\n\nAbout ice:")
    assert llm.complete("About ice:").text == answer


# Messages


def test_roles_become_those_of_chat_templates():
    roles = [
        message["role"] for message in template_messages(ChatMessage("?", role=role) for role in MessageRole)
    ]
    assert set(roles) == {"system", "user", "assistant", "tool"}
    assert roles.count("system") == roles.count("tool") == 2


def test_calls_and_results_of_tools_become_those_of_chat_templates():
    call = ToolCallBlock(tool_call_id="c1", tool_name="search", tool_kwargs={"input": "ice"})
    result = ChatMessage("Ice.", role="tool", additional_kwargs={"tool_call_id": "c1"})
    called, answered = template_messages([ChatMessage(role="assistant", blocks=[call]), result])
    assert called["content"] is None
    assert called["tool_calls"] == [
        {"type": "function", "id": "c1", "function": {"name": "search", "arguments": {"input": "ice"}}}
    ]
    assert answered == {"role": "tool", "content": "Ice.", "tool_call_id": "c1"}


@pytest.mark.parametrize("arguments", ['{"input": "ice"}', {"input": "ice"}])
def test_calls_in_histories_of_other_providers_are_read(arguments):
    calls = [{"id": "c1", "type": "function", "function": {"name": "search", "arguments": arguments}}]
    message = ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": calls})
    (shown,) = template_messages([message])
    assert shown["tool_calls"][0]["function"] == {"name": "search", "arguments": {"input": "ice"}}


def test_citable_blocks_are_shown_and_known_as_passages():
    cited = CitableBlock(title="Lighthouse", source="a.txt", content=[TextBlock(text=LIGHTHOUSE)])
    message = ChatMessage(blocks=[cited, TextBlock(text="When?")])
    assert template_messages([message])[0]["content"] == f"Lighthouse\n{LIGHTHOUSE}\nWhen?"
    assert cited_texts([message]) == [LIGHTHOUSE]
    assert tiny_llm(salt="citable").chat([message]).additional_kwargs["num_misses"] == 1


def test_marks_and_thoughts_are_not_shown():
    silent = [CachePoint(cache_control=CacheControl(type="ephemeral")), ThinkingBlock(content="Hm.")]
    message = ChatMessage(role="assistant", blocks=[*silent, TextBlock(text="Yes.")])
    assert template_messages([message])[0]["content"] == "Yes."


def test_an_image_is_refused():
    with pytest.raises(InvalidInputError, match="'image', and this model reads text only"):
        tiny_llm().chat([ChatMessage(blocks=[ImageBlock(image=b"\x89PNG")])])


# Options


def test_stop_strings_and_the_length_of_an_answer_can_be_set_per_call():
    llm = full_llm()
    whole = llm.complete("abc", formatted=True, max_tokens=12).text
    assert llm.complete("abc", formatted=True, max_new_tokens=12).text == whole
    stopped = llm.complete("abc", formatted=True, max_tokens=12, stop=[whole[3]])
    assert stopped.text == whole[:3].split(whole[3])[0]
    assert stopped.additional_kwargs["finish_reason"] == "stop"


def test_options_of_every_call_give_way_to_those_of_one_call():
    llm = full_llm(generate_kwargs={"max_tokens": 3})
    given = [{}, {"max_new_tokens": 5}, {"max_tokens": 4}, {"max_tokens": None}]
    responses = [llm.complete("a", formatted=True, **options) for options in given]
    assert [response.additional_kwargs["completion_tokens"] for response in responses] == [3, 5, 4, 3]


def test_stopping_ids_end_an_answer_beside_the_models_own():
    free = full_llm().complete("abc", formatted=True).raw["token_ids"]
    stopped = full_llm(stopping_ids=[free[4]]).complete("abc", formatted=True)
    assert stopped.raw["token_ids"] == free[: free.index(free[4]) + 1]
    assert stopped.additional_kwargs["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7, "do_sample": True}),
        ({"top_p": 0.9}, {"top_p": 0.9, "do_sample": True}),
        ({"top_k": 5, "do_sample": False}, {"top_k": 5, "do_sample": False}),
        ({"temperature": 0}, {"do_sample": False}),
        ({"temperature": None}, {"do_sample": False}),
        ({"temperature": 0.0, "top_p": 0.9}, {"top_p": 0.9, "do_sample": False}),
    ],
)
def test_an_option_of_sampling_asks_for_sampling(given, sampled):
    assert call_options(given)[1] == sampled


def test_a_temperature_makes_answers_differ_and_zero_does_not():
    llm = full_llm(max_new_tokens=30)
    greedy = {llm.complete("abc", formatted=True, temperature=0).text for _ in range(2)}
    torch.manual_seed(0)
    drawn = {llm.complete("abc", formatted=True, temperature=5.0).text for _ in range(3)}
    assert len(greedy) == 1
    assert len(drawn) > 1


def test_an_unknown_option_is_refused():
    with pytest.raises(InvalidInputError, match="'temprature' is unknown"):
        tiny_llm().complete("abc", temprature=0.5)


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValidationError, match="cachedir"):
        tiny_llm(cachedir="kv")


def test_a_model_must_be_named():
    with pytest.raises(InvalidInputError, match="model_name="):
        BlockCacheLLM(cache_dir="kv")


@pytest.mark.parametrize("options", [{"model_kwargs": {"quantization_config": 4}}, {"device_map": {"": 0}}])
def test_what_is_not_loaded_here_is_refused(options):
    with pytest.raises(InvalidInputError, match="load the model with transformers"):
        BlockCacheLLM(model_name="m", **options)


def test_arguments_of_huggingface_llm_load_the_model(tiny_model_path):
    llm = BlockCacheLLM(
        model_name=tiny_model_path,
        tokenizer_name=str(tiny_model_path),
        context_window=900,
        max_new_tokens=4,
        device_map="cpu",
        model_kwargs={"torch_dtype": torch.bfloat16},
        generate_kwargs={"temperature": 0.7, "top_k": 50},
        stopping_ids=[3],
        is_chat_model=True,
        tokenizer_outputs_to_remove=["token_type_ids"],
    )
    assert not llm.engine.is_loaded
    assert llm.metadata.context_window == 900
    assert llm.complete("abc").additional_kwargs["completion_tokens"] <= 4
    assert llm.engine.get().model.network.dtype == torch.bfloat16
    llm.engine.close()


# Streams


def test_pieces_of_a_stream_add_up_to_the_answer():
    llm = full_llm()
    *pieces, last = llm.stream_chat(ASKED)
    whole = llm.chat(ASKED)
    assert "".join(piece.delta for piece in pieces) == last.message.content == whole.message.content
    assert [piece.message.content for piece in pieces][-1] == whole.message.content
    assert last.delta == ""
    assert last.additional_kwargs["completion_tokens"] == whole.additional_kwargs["completion_tokens"]


def test_pieces_of_a_completion_add_up_to_the_text():
    llm = full_llm()
    *pieces, last = llm.stream_complete("abc", formatted=True)
    assert "".join(piece.delta for piece in pieces) == last.text == generated("abc")
    assert last.raw["token_ids"] == llm.complete("abc", formatted=True).raw["token_ids"]


def test_who_stops_reading_stops_decoding():
    llm = full_llm(max_new_tokens=4000)
    stream = llm.stream_complete("abc", formatted=True)
    next(stream)
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 2  # four thousand tokens take longer than that by far
    llm.complete("abc", formatted=True, max_tokens=1)


def test_asynchronous_calls_answer_as_the_others():
    llm = full_llm()

    async def ask():
        chat, completion = await asyncio.gather(llm.achat(ASKED), llm.acomplete("abc", formatted=True))
        chat_pieces = [piece async for piece in await llm.astream_chat(ASKED)]
        pieces = [piece async for piece in await llm.astream_complete("abc", formatted=True)]
        return chat, completion, chat_pieces, pieces

    chat, completion, chat_pieces, pieces = asyncio.run(ask())
    assert chat.message.content == chat_pieces[-1].message.content == llm.chat(ASKED).message.content
    assert completion.text == pieces[-1].text == llm.complete("abc", formatted=True).text
    assert "".join(piece.delta for piece in chat_pieces) == chat.message.content


async def last_of(stream):
    return [piece async for piece in await stream][-1]


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.achat(ASKED),
        lambda llm: llm.acomplete("abc"),
        lambda llm: last_of(llm.astream_chat(ASKED)),
        lambda llm: last_of(llm.astream_complete("abc")),
        lambda llm: Setup(llm, stories()).query_engine().aquery("When?"),
    ],
    ids=["achat", "acomplete", "astream_chat", "astream_complete", "a query engine"],
)
def test_a_cancelled_task_stops_decoding(ask):
    slow = Slow(0.02)
    options = {"min_new_tokens": 100, "logits_processor": LogitsProcessorList([slow])}
    llm = tiny_llm(max_new_tokens=100, generate_kwargs=options)

    async def ask_and_cancel():
        task = asyncio.create_task(ask(llm))
        while slow.num_steps < 3:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask_and_cancel())
    for thread in threading.enumerate():
        if thread.name == "rag-blockcache-answer":
            thread.join()
    assert 3 <= slow.num_steps < 50


async def while_watched(asked: list) -> tuple[list, float]:
    """Await all that was asked; return the results, and the longest that the loop let a task wait for it."""
    stalls: list[float] = []

    async def watch():
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.005)
            stalls.append(time.perf_counter() - start - 0.005)

    watching = asyncio.create_task(watch())
    results = await asyncio.gather(*asked)
    watching.cancel()
    return results, max(stalls)


@pytest.fixture
def _frequent_turns():
    """Have threads hand on the interpreter often: a tiny model holds it always, a real one hardly ever."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_frequent_turns")
def test_eight_chats_at_a_time_never_hold_up_the_event_loop():
    llm = tiny_llm(salt="eight chats", max_new_tokens=60)
    chats = [[ChatMessage(f"{LIGHTHOUSE}\n\nWhat happened in {1850 + year}?")] for year in range(8)]
    expected = [llm.chat(chat, hints=[LIGHTHOUSE]).message.content for chat in chats]

    async def ask_all():
        return await while_watched([llm.achat(chat, hints=[LIGHTHOUSE]) for chat in chats])

    async def ask_in_threads():
        return await while_watched([asyncio.to_thread(llm.chat, chat) for chat in chats])

    attempts = []
    for _ in range(5):
        responses, stall = asyncio.run(ask_all())
        assert [response.message.content for response in responses] == expected
        assert all(response.additional_kwargs["num_hits"] == 1 for response in responses)
        _, stall_by_others = asyncio.run(ask_in_threads())  # the machine may be busy, and hold up any loop
        attempts.append(stall - stall_by_others)
        if stall < 0.05:
            return
    assert min(attempts) < 0.05


def test_eight_queries_at_a_time_are_answered_right():
    engine = Setup(tiny_llm(salt="eight queries"), stories()).query_engine()
    questions = [f"What happened in {1850 + year}?" for year in range(8)]
    expected = [str(engine.query(question)) for question in questions]
    assert len(set(expected)) > 1

    async def ask_all():
        return await asyncio.gather(*(engine.aquery(question) for question in questions))

    assert [str(answer) for answer in asyncio.run(ask_all())] == expected


# Counts, events, settings


def test_a_response_says_what_was_used_and_reused():
    llm = tiny_llm(salt="counts")
    asked = [ChatMessage(f"{LIGHTHOUSE}\n\nWhen was it built?")]
    for num_hits, num_misses in [(0, 1), (1, 0)]:
        response = llm.chat(asked, hints=[LIGHTHOUSE])
        counts = response.additional_kwargs
        assert (counts["num_hits"], counts["num_misses"]) == (num_hits, num_misses)
        assert counts["prompt_tokens"] == len(TINY_TOKENIZER.encode(rendered(asked)))
        assert counts["total_tokens"] == counts["prompt_tokens"] + counts["completion_tokens"]
        assert counts["ttft_seconds"] > 0
    assert counts["num_reused_tokens"] >= len(LIGHTHOUSE)
    assert response.raw["usage"]["prompt_tokens_details"] == {"cached_tokens": counts["num_reused_tokens"]}
    assert response.raw["policy"] == "block"


def test_documents_of_a_call_are_read_by_the_model():
    llm = tiny_llm(salt="documents")
    without = llm.chat(ASKED).raw["usage"]["prompt_tokens"]
    with_documents = llm.chat(ASKED, documents=[LIGHTHOUSE]).raw["usage"]["prompt_tokens"]
    assert with_documents >= without + len(LIGHTHOUSE)


def test_passages_are_not_looked_for_where_that_is_not_wanted():
    llm = tiny_llm(salt="unsought")
    llm.engine.get().prefill([LIGHTHOUSE])
    asked = [ChatMessage(f"{LIGHTHOUSE}\n\nWhen?")]
    assert llm.chat(asked).additional_kwargs["num_hits"] == 1
    assert llm.chat(asked, finds_passages=False).additional_kwargs["num_hits"] == 0


@pytest.mark.parametrize("is_streaming", [False, True])
def test_callbacks_and_token_counters_hear_of_every_call(is_streaming):
    debug, counter = LlamaDebugHandler(print_trace_on_end=False), TokenCountingHandler()
    llm = tiny_llm(callback_manager=CallbackManager([debug, counter]))
    response = list(llm.stream_chat(ASKED))[-1] if is_streaming else llm.chat(ASKED)
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    assert counter.prompt_llm_token_count == response.additional_kwargs["prompt_tokens"]
    assert counter.completion_llm_token_count == response.additional_kwargs["completion_tokens"]


def test_metadata_is_known_without_loading_weights(tiny_model_path):
    llm = BlockCacheLLM(model_name=tiny_model_path, max_new_tokens=7)
    known = llm.metadata
    assert (known.context_window, known.num_output, known.is_chat_model) == (2048, 7, True)
    assert known.is_function_calling_model
    assert known.model_name == str(tiny_model_path)
    assert not llm.engine.is_loaded


def test_an_llm_is_made_without_looking_for_its_model():
    llm = BlockCacheLLM(model_name="nobody/has-this", cache_dir="kv")
    assert not llm.engine.is_loaded


def test_llms_with_equal_arguments_share_one_engine():
    first, second, other = tiny_llm(salt="shared"), tiny_llm(salt="shared"), tiny_llm(salt="unshared")
    assert first.engine.get() is second.engine.get()
    assert other.engine.get() is not first.engine.get()


def test_settings_count_tokens_as_the_model_does():
    Settings.tokenizer = str.split
    llm = tiny_llm()
    assert Settings.tokenizer("é!") == TINY_TOKENIZER.encode("é!", add_special_tokens=False)
    assert isinstance(Settings.prompt_helper, BlockPromptHelper)
    Settings.llm = llm
    assert isinstance(Settings.prompt_helper, BlockPromptHelper)


def test_settings_stay_as_they_are_where_that_is_wanted():
    Settings.tokenizer = str.split
    tiny_llm(sets_settings=False)
    assert Settings.tokenizer is str.split
    assert not isinstance(Settings._prompt_helper, BlockPromptHelper)


def test_a_prompt_helper_of_the_user_stays():
    Settings.prompt_helper = chosen = PromptHelper(context_window=900)
    tiny_llm()
    assert Settings.prompt_helper is chosen


def test_an_llm_is_written_and_read_as_other_components(tiny_model_path):
    llm = BlockCacheLLM(model_name=tiny_model_path, cache_dir="kv", salt="a", generate_kwargs={"top_k": 3})
    again = BlockCacheLLM.from_json(llm.to_json())
    assert again.to_dict() == llm.to_dict()
    assert again.engine.model_name == str(tiny_model_path)


def test_an_llm_and_its_tokenizer_go_to_other_processes(tiny_model_path):
    llm = BlockCacheLLM(model_name=tiny_model_path, max_new_tokens=3)
    again = pickle.loads(pickle.dumps(llm))
    assert again.engine == llm.engine
    tokenizer = pickle.loads(pickle.dumps(Settings.tokenizer))
    assert tokenizer("a b") == Settings.tokenizer("a b")


def test_a_copied_llm_shares_engine_and_weights():
    llm = tiny_llm()
    for again in (copy.copy(llm), copy.deepcopy(llm), llm.model_copy(deep=True)):
        assert again.model is llm.model
        assert again.engine is llm.engine
        assert again.complete("abc").text == llm.complete("abc").text
    copy.deepcopy(llm).generate_kwargs["num_beams"] = 2
    assert llm.generate_kwargs == {}


def test_an_llm_is_an_llm():
    assert isinstance(tiny_llm(), LLM)
    assert tiny_llm().class_name() == "BlockCacheLLM"


@pytest.mark.parametrize("name", ["llm", "prompt_helper"])
def test_examples_run(name, tiny_model, tiny_tokenizer):
    module = importlib.import_module(f"rag_blockcache.integrations.llama_index.{name}")
    found = doctest.testmod(module, extraglobs={"tiny_model": tiny_model, "tiny_tokenizer": tiny_tokenizer})
    assert found.attempted
    assert not found.failed


def test_without_llama_index_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("rag_blockcache.integrations.llama_index")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == "llama_index"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [_WithoutLlamaIndex(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"rag_blockcache\[llama-index\]"):
        importlib.import_module("rag_blockcache.integrations.llama_index")


class _WithoutLlamaIndex:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llama_index":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

"""Chats and texts: known passages are found wherever they stand, and everything stays in its place."""

from __future__ import annotations

import logging

import architectures
import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_equivalence import FLOAT32, distance

from rag_blockcache import BlockCache, Chat, Passage, Question, Text
from rag_blockcache.errors import InvalidInputError, OutOfSpaceError
from rag_blockcache.prompt import Segment

MILL = "The mill has a thousand columns of figure wheels, and the store keeps fifty digits in each of them."
NOTE = "Ada wrote the note on the engine in 1843; it is longer than the text that it is a note to. é 日本."
PART = "Charles built a part of the difference engine before the money ran out, and the part still works."
LONG = " ".join(f"In the year {1800 + i} {i * 7919} letters came to the society." for i in range(12))
KNOWN = [MILL, NOTE, PART, LONG]


@pytest.fixture
def cache(tiny_model, tiny_tokenizer):
    with BlockCache(
        tiny_model, None, tokenizer=tiny_tokenizer, passage_format="verbatim", blocks_see="themselves"
    ) as cache:
        cache.prefill(KNOWN)
        yield cache


def cut(cache, request) -> list[Segment]:
    return cache._planner.segments(request)


def blocks_in(cache, request) -> list[str]:
    """Return the texts of the blocks that a request places, in order."""
    return [
        cache.tokenizer.decode(list(segment.token_ids))
        for segment in cut(cache, request)
        if segment.kind == "passage"
    ]


def text_of(cache, request) -> str:
    return cache.tokenizer.decode([token for segment in cut(cache, request) for token in segment.token_ids])


def rendered(cache, messages, **options) -> str:
    return cache.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )


CHATS = {
    "in a system message": [
        {"role": "system", "content": f"Context:\n{MILL}\n\n{NOTE}\n---"},
        {"role": "user", "content": "How many columns?"},
    ],
    "in the middle of a user message": [{"role": "user", "content": f"Read {MILL} then {NOTE}. How many?"}],
    "filling a message": [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": MILL},
        {"role": "user", "content": NOTE},
    ],
    "in a tool message": [
        {"role": "user", "content": "How many?"},
        {"role": "tool", "content": f"{MILL}\n\n{NOTE}"},
    ],
    "in an earlier turn": [
        {"role": "user", "content": f"{MILL} {NOTE} How many?"},
        {"role": "assistant", "content": "A thousand."},
        {"role": "user", "content": "And digits?"},
    ],
}


def as_shown(message):
    """Return a message as a model reads it whose template knows nothing of tools."""
    if message["role"] != "tool":
        return message
    return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_passages_are_found_wherever_they_stand_and_the_prompt_stays_as_it_is(messages, cache):
    chat = Chat(messages)
    assert blocks_in(cache, chat) == [MILL, NOTE]
    shown = [as_shown(message) for message in messages]
    assert text_of(cache, chat) == rendered(cache, shown)
    answer = cache.answer(chat, max_new_tokens=2, policy="block")
    assert (answer.num_hits, answer.num_misses) == (2, 0)
    assert answer.num_reused_tokens >= len(MILL.encode()) + len(NOTE.encode())
    assert answer.num_prompt_tokens == len(cache.tokenizer(rendered(cache, shown)).input_ids)


def test_a_passage_that_stands_twice_is_placed_twice(cache):
    chat = Chat([{"role": "user", "content": f"{MILL}\n{NOTE}\n{MILL}\nHow many?"}])
    assert blocks_in(cache, chat) == [MILL, NOTE, MILL]
    assert cache.answer(chat, max_new_tokens=2, policy="block").num_hits == 3


@torch.inference_mode()
def masked_prefill(network, segments):
    """Return the last logits of one pass in which passages see themselves alone, and all else everything."""
    spans = torch.tensor([len(segment.token_ids) for segment in segments])
    owner = torch.repeat_interleave(torch.arange(len(segments)), spans)
    is_text = torch.tensor([segment.kind == "text" for segment in segments])[owner]
    place = torch.arange(len(owner))
    seen = ((owner[:, None] == owner) | is_text[:, None]) & (place[:, None] >= place)
    token_ids = torch.tensor([token for segment in segments for token in segment.token_ids])[None]
    output = network(
        input_ids=token_ids, attention_mask=seen[None, None], position_ids=place[None], use_cache=False
    )
    return output.logits[0, -1].float()


REQUESTS = {
    **{name: Chat(messages) for name, messages in CHATS.items()},
    "text": Text(f"Facts: {NOTE}\n\nMore facts: {PART}\n{MILL}\nQuestion: who? Answer:"),
    "text that begins with a passage": Text(f"{NOTE} Who?"),
    "cut at its end": Text(f"Facts: {LONG[:500]}\nQuestion: who?"),
    "cut and whole": Chat([{"role": "user", "content": f"{LONG[:400]} (cut) {MILL} {LONG} Who?"}]),
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-yarn", "granite"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_request_gives_the_logits_of_one_prefill_with_the_block_mask(name, request_, tiny_tokenizer):
    network = architectures.accepted(name)
    if network.config.max_position_embeddings < 1600:
        network = architectures.build(
            type(network).__name__.removesuffix("ForCausalLM"), {"max_position_embeddings": 2048}
        )
    with BlockCache(
        network, None, tokenizer=tiny_tokenizer, passage_format="verbatim", blocks_see="themselves"
    ) as cache:
        cache.register(KNOWN)
        first = cache.first_logits(request_, policy="block")  # encodes
        again = cache.first_logits(request_, policy="block")  # reuses
        reference = masked_prefill(network, cut(cache, request_))
    assert distance(first, reference) < FLOAT32
    assert distance(again, reference) < FLOAT32


def test_a_passage_cut_at_its_end_reuses_the_beginning_of_its_block(cache):
    request = Text(f"Facts: {LONG[:500]}\nQuestion: who?")
    assert blocks_in(cache, request) == [LONG[:500]]
    answer = cache.answer(request, max_new_tokens=2, policy="block")
    assert (answer.num_hits, answer.num_misses) == (1, 0)
    assert answer.num_reused_tokens >= 500


@pytest.mark.real_weights
def test_a_cut_within_a_token_computes_only_what_differs(smollm2_path):
    with BlockCache(smollm2_path, None, passage_format="verbatim") as cache:
        cache.prefill([LONG])
        whole = cache.prompt.text_tokens(LONG)
        for end in range(400, 430):
            [_, passage, last] = cut(cache, Text(f"Facts: {LONG[:end]}|"))
            shown = passage.token_ids + last.token_ids
            assert cache.tokenizer.decode(shown) == f"{LONG[:end]}|"
            assert passage.whole == whole
            assert len(last.token_ids) < 6


def test_a_passage_that_ends_a_text_leaves_something_to_compute(cache):
    answer = cache.answer(Text(f"{NOTE}\n{MILL}"), max_new_tokens=2, policy="block")
    assert answer.num_hits == 1
    assert len(answer.token_ids) in (1, 2)


WORDS = st.sampled_from([*KNOWN, LONG[:300], "\n", " ", "Who?", "<|im_end|>", "é", "Context:\n---\n", ""])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(contents=st.lists(st.lists(WORDS, max_size=5).map("".join), min_size=1, max_size=4))
def test_any_chat_keeps_its_text_and_order(contents, cache):
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    segments = cut(cache, Chat(messages))
    assert text_of(cache, Chat(messages)) == rendered(cache, messages)
    assert segments[0].kind == segments[-1].kind == "text"
    control = cache.tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokens = [token for segment in segments for token in segment.token_ids]
    assert tokens.count(control) == len(messages), "what a user spelled stays text"


# What is known, and how it becomes known


def test_a_hint_makes_a_passage_known_that_nobody_prefilled(tiny_cache):
    content = f"Facts:\n{MILL}\nWho?"
    assert blocks_in(tiny_cache, Chat([{"role": "user", "content": content}])) == []
    chat = Chat([{"role": "user", "content": content}], hints=[MILL, "what is not there does not matter" * 3])
    assert blocks_in(tiny_cache, chat) == [MILL]
    answer = tiny_cache.answer(chat, max_new_tokens=2, policy="block")
    assert (answer.num_hits, answer.num_misses) == (0, 1)
    assert answer.num_stored_tokens >= len(MILL)
    again = tiny_cache.answer(Text(content), max_new_tokens=2, policy="block")  # without the hint
    assert (again.num_hits, again.num_misses) == (1, 0)
    assert again.num_stored_tokens == 0 or again.num_reused_tokens >= len(MILL)


def test_hints_and_documents_may_be_left_unfound(cache):
    messages = [{"role": "user", "content": f"{MILL} How many?"}]
    assert blocks_in(cache, Chat(messages, finds_passages=False, hints=[MILL])) == []
    assert text_of(cache, Chat(messages, finds_passages=False)) == rendered(cache, messages)


def test_documents_are_shown_once_whether_they_stand_in_the_messages_or_not(cache):
    messages = [
        {"role": "system", "content": f"Use this: {MILL}"},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "How many?"},
    ]
    chat = Chat(messages, documents=[Passage(MILL, title="The mill"), NOTE])
    assert blocks_in(cache, chat) == [MILL, NOTE]
    asked = f"{cache.prompt.preamble}{NOTE}\n\nHow many?"
    assert text_of(cache, chat) == rendered(cache, [*messages[:3], {"role": "user", "content": asked}])


def test_documents_before_a_text(cache):
    request = Text("Question: who? Answer:", documents=[NOTE])
    assert text_of(cache, request) == f"{cache.prompt.preamble}{NOTE}\n\nQuestion: who? Answer:"
    assert blocks_in(cache, request) == [NOTE]


def test_a_registered_passage_is_found_and_a_forgotten_one_is_not(cache):
    assert blocks_in(cache, Text(f"{PART} Who?")) == [PART]
    name = cache.block(PART).block_id
    assert name in cache.store
    cache.forget([PART])
    assert blocks_in(cache, Text(f"{PART} Who?")) == []
    assert name not in cache.store
    cache.register([PART])
    assert blocks_in(cache, Text(f"{PART} Who?")) == [PART]
    assert name not in cache.store, "nothing is encoded before it is needed"


def test_what_was_prefilled_is_known_to_the_next_process(tiny_model, tiny_tokenizer, tmp_path):
    options = {"tokenizer": tiny_tokenizer, "passage_format": "verbatim"}
    with BlockCache(tiny_model, tmp_path, **options) as cache:
        cache.prefill(KNOWN)
    with BlockCache(tiny_model, tmp_path, **options) as cache:
        answer = cache.answer(Text(f"{PART} Who?"), max_new_tokens=1, policy="block")
        assert (answer.num_hits, answer.num_misses) == (1, 0)


def test_a_passage_longer_than_the_window_is_computed_where_a_piece_of_it_stands(tiny_tokenizer):
    network = architectures.build("Llama", {"max_position_embeddings": 512})
    with BlockCache(
        network, None, tokenizer=tiny_tokenizer, passage_format="verbatim", blocks_see="themselves"
    ) as cache:
        cache.register([LONG])
        answer = cache.answer(Text(f"Facts: {LONG[:300]} Who?"), max_new_tokens=1, policy="block")
    assert (answer.num_hits, answer.num_misses) == (0, 0)


# Admission


def ask(cache, content=f"Facts:\n{MILL}\nWho?", **options):
    return cache.answer(Text(content, hints=[MILL]), max_new_tokens=1, policy="block", **options)


def test_always_stores_at_the_first_use(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, admission="always") as cache:
        assert ask(cache).num_misses == 1
        assert cache._planner.segments(Text(MILL + " ?"))[1].text == MILL
        [block] = [
            b
            for b in cache._planner.plan(
                Text(f"Facts:\n{MILL}\nWho?"), policy="block", max_new_tokens=1, start=0.0
            ).blocks.values()
            if len(b.token_ids) == len(MILL)
        ]
        assert block.block_id in cache.store.disk


def test_frequency_stores_at_the_second_use(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, admission="frequency") as cache:
        before = len(cache.store.disk)
        first = ask(cache)
        assert (first.num_hits, first.num_misses) == (0, 1)
        assert len(cache.store.disk) == before, "once is not often"
        second = ask(cache)
        assert (second.num_hits, second.num_misses) == (1, 0)
        assert len(cache.store.disk) == before + 2, "the passage, and the text before it"
        ask(cache)
        assert len(cache.store.disk) == before + 2
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, admission="frequency") as cache:
        assert ask(cache).num_hits == 1


def test_a_block_on_probation_that_is_not_worth_using_stays_there(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, admission="frequency") as cache:
        before = len(cache.store.disk)
        request = Text(f"Facts:\n{MILL}\nWho?", hints=[MILL])
        cache.answer(request, max_new_tokens=1)
        monkeypatch.setattr(cache._break_even, "pays", lambda *numbers: False)
        assert cache.answer(request, max_new_tokens=1).policy == "full"
        assert len(cache.store.disk) == before
        monkeypatch.setattr(cache._break_even, "pays", lambda *numbers: True)
        cache.answer(request, max_new_tokens=1)
        assert len(cache.store.disk) == before + 2


def test_off_uses_a_block_and_keeps_nothing(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, admission="off") as cache:
        before = len(cache.store)
        for _ in range(2):
            answer = ask(cache)
            assert (answer.num_hits, answer.num_misses, answer.num_stored_tokens) == (0, 1, 0)
        assert len(cache.store) == before
        assert blocks_in(cache, Text(f"{MILL} Who?")) == []


def test_prefilled_blocks_are_used_whatever_the_admission(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(
        tiny_model, tmp_path, tokenizer=tiny_tokenizer, admission="off", passage_format="verbatim"
    ) as cache:
        cache.prefill([MILL])
        assert ask(cache).num_hits == 1


def test_an_unknown_admission_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(InvalidInputError, match="'sometimes' is unknown; use one of"):
        BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, admission="sometimes")


def test_a_chat_so_far_is_not_stored_at_its_first_use(tiny_model, tiny_tokenizer, tmp_path):
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer, passage_format="verbatim") as cache:
        cache.prefill([MILL])
        before = len(cache.store.disk)
        for turn in range(3):
            cache.answer(Text(f"Turn {turn}: {MILL} Who?"), max_new_tokens=1, policy="block")
        assert len(cache.store.disk) == before
        cache.answer(Text(f"Turn 0: {MILL} Who?"), max_new_tokens=1, policy="block")
        assert len(cache.store.disk) == before + 1


def test_a_full_disk_costs_no_answer_when_texts_are_learned(tiny_cache, monkeypatch, caplog):
    def full(texts):
        raise OutOfSpaceError("no space left")

    monkeypatch.setattr(tiny_cache._registry, "add", full)
    with caplog.at_level(logging.WARNING):
        assert ask(tiny_cache).num_misses == 1
    assert "1 texts were not made known" in caplog.text


# Texts


def test_control_tokens_of_a_text_count_and_those_of_its_passages_do_not(cache):
    tricky = f"<|im_end|> is how a turn ends, and here it is nothing but a word: <|im_start|>system. {MILL}"
    prompt = f"<|im_start|>user\n{tricky}\nWho?<|im_end|>\n<|im_start|>assistant\n"
    segments = cut(cache, Text(prompt, hints=[tricky]))
    start, end = cache.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    [passage] = [segment for segment in segments if segment.kind == "passage"]
    assert not {start, end} & set(passage.token_ids)
    others = [token for segment in segments if segment.kind == "text" for token in segment.token_ids]
    assert (others.count(start), others.count(end)) == (2, 1)


@pytest.mark.parametrize("prompt", ["Once upon a time", "<s>Once upon a time"])
def test_a_text_begins_with_what_its_tokenizer_begins_with_once(prompt, tiny_model):
    import tokenizers_made_here

    tokenizer = tokenizers_made_here.byte_level(None, bos=True)
    with BlockCache(tiny_model, None, tokenizer=tokenizer) as cache:
        [_, text] = cache.segments(Text(prompt))
    assert text == tokenizer("Once upon a time").input_ids
    assert text.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Text("  "), "the prompt is empty"),
        (Chat([]), "the chat has no messages"),
        (Question(""), "the question is empty"),
        ("Who?", "a request is str; pass a Question, a Chat or a Text"),
        (
            Chat([{"role": "user", "content": [{"text": "a"}]}]),
            "needs its content as a string",
        ),
        (Chat([{"role": "user", "content": "a"}], documents="one"), "wrap a single passage in a list"),
        (Text("a", hints="one"), "wrap a single hint in a list"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(request_, message, cache):
    with pytest.raises(InvalidInputError, match=message):
        cache.answer(request_)


def test_a_request_takes_no_passages_beside_it(cache):
    with pytest.raises(InvalidInputError, match="holds its passages"):
        cache.first_logits(Text("Who?"), [MILL])


def test_a_batch_of_all_kinds_gives_the_answers_of_one_at_a_time(cache):
    requests = [
        Question("How many?", [MILL, NOTE]),
        Chat(CHATS["in a system message"]),
        Text(f"Facts: {LONG[:500]} {PART}\nQuestion: who?"),
        Text("Nothing known"),
    ]
    together = cache.answer_batch(requests, max_new_tokens=6, policy="block")
    alone = [cache.answer(request, max_new_tokens=6, policy="block") for request in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.num_hits for answer in together] == [2, 2, 2, 0]


def test_policy_full_of_a_chat_is_the_bare_model_over_the_same_tokens(tiny_model, cache):
    chat = Chat(CHATS["in a system message"])
    token_ids = torch.tensor([[token for segment in cut(cache, chat) for token in segment.token_ids]])
    generated = tiny_model.generate(token_ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert (
        cache.answer(chat, max_new_tokens=8, policy="full").token_ids
        == generated[0, token_ids.shape[1] :].tolist()
    )


def test_a_format_with_a_separator_shows_passages_apart(cache):
    assert text_of(cache, Question("Who?", [f"  {MILL}\n", Passage(NOTE, title="Not shown")])) == rendered(
        cache,
        [{"role": "user", "content": f"{cache.prompt.preamble}{MILL}\n\n{NOTE}\n\nQuestion: Who?"}],
    )


def test_a_base_model_continues_a_chat_too(tiny_model):
    with BlockCache(tiny_model, None, tokenizer=byte_tokenizer(None), passage_format="verbatim") as cache:
        cache.prefill([MILL])
        assert (
            cache.answer(Chat(CHATS["in a system message"]), max_new_tokens=1, policy="block").num_hits == 1
        )

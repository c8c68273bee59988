"""``BlockPromptHelper`` packs what LlamaIndex packs, and keeps passages whole where that would cut them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from hypothesis import given
from hypothesis import strategies as st
from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.schema import TextNode
from llama_index_pipelines import TINY_TOKENIZER, Setup, own_settings, recorded, tiny_llm
from rag_blockcache.integrations.llama_index import BlockPromptHelper

pytestmark = pytest.mark.usefixtures(own_settings.__name__)

ASK = PromptTemplate("Context: {context_str}\nQuestion: ?")
passages = st.lists(st.text("ab \n", min_size=0, max_size=30), max_size=8)


def words(text: str) -> list[str]:
    return text.split()


def helper(kind: type = BlockPromptHelper, window: int = 40, **options):
    return kind(context_window=window, num_output=10, tokenizer=words, **options)


@given(passages)
def test_what_fits_into_one_prompt_is_packed_as_by_llama_index(texts):
    assert helper(window=4000).repack(ASK, texts) == helper(PromptHelper, 4000).repack(ASK, texts)


@pytest.mark.parametrize(("tokenizer", "window"), [(words, 40), (list, 90)])
@given(texts=passages)
def test_a_passage_that_fits_is_never_cut(tokenizer, window, texts):
    packing = BlockPromptHelper(window, 10, tokenizer=tokenizer)
    size = packing.get_text_splitter_given_prompt(ASK).chunk_size
    packs = packing.repack(ASK, texts)
    whole = [text.strip() for text in texts if text.strip()]
    assert all(len(tokenizer(text)) <= size for text in whole)
    assert "\n\n".join(packs) == "\n\n".join(whole)
    assert all(len(tokenizer(pack)) <= size for pack in packs)


def test_what_stands_between_passages_takes_room_too():
    packing = BlockPromptHelper(90, 10, tokenizer=list)
    size = packing.get_text_splitter_given_prompt(ASK).chunk_size
    texts = ["a" * (size - 10), "b" * 8]
    assert packing.repack(ASK, texts) == ["\n\n".join(texts)]
    assert packing.repack(ASK, [texts[0], "b" * 9]) == [texts[0], "b" * 9]


def test_where_llama_index_cuts_passages_whole_ones_are_packed():
    texts = [f"{letter} " * 12 for letter in "abcde"]
    stripped = [text.strip() for text in texts]
    cut = helper(PromptHelper).repack(ASK, texts)
    assert not all(any(text in pack for pack in cut) for text in stripped)
    assert helper().repack(ASK, texts) == stripped  # two of them do not fit together


def test_a_passage_that_is_too_long_by_itself_is_cut_as_by_llama_index():
    long = " ".join(f"word{index}" for index in range(50))
    *before, last = helper().repack(ASK, ["short one", long, "short two"])
    assert before == ["short one", *helper(PromptHelper).repack(ASK, [long])]
    assert last == "short two"


def test_a_pack_that_has_less_room_the_next_time_is_parted_between_passages():
    texts = ["a " * 8, "b " * 8]
    packed = helper()
    (pack,) = packed.repack(ASK, texts)
    assert packed.repack(ASK, [pack]) == [pack]
    assert packed.repack(ASK, [pack], padding=12) == [text.strip() for text in texts]


def test_no_passages_make_one_empty_prompt_as_in_llama_index():
    assert helper().repack(ASK, []) == helper(PromptHelper).repack(ASK, []) == [""]


def test_the_window_is_that_of_the_llm_that_is_asked():
    follower = BlockPromptHelper(tokenizer=words)
    small, large = (tiny_llm(context_window=size, max_new_tokens=10) for size in (60, 600))
    texts = ["a " * 30, "b " * 30]
    assert len(follower.repack(ASK, texts, llm=small)) == 2
    assert len(follower.repack(ASK, texts, llm=large)) == 1
    assert follower.context_window == BlockPromptHelper().context_window  # nothing was noted


@pytest.mark.parametrize("choose", ["at once", "later"])
def test_a_window_that_was_chosen_stays(choose):
    chosen = (
        BlockPromptHelper(60, 10, tokenizer=words)
        if choose == "at once"
        else BlockPromptHelper(tokenizer=words)
    )
    chosen.context_window = 60  # as LlamaIndex's Settings.context_window does
    large = tiny_llm(context_window=600, max_new_tokens=10)
    assert len(chosen.repack(ASK, ["a " * 30, "b " * 30], llm=large)) == 2


def test_messages_are_counted_as_by_llama_index():
    Settings.tokenizer = words
    chat = ChatPromptTemplate([ChatMessage("You are {mood}.", role="system"), ChatMessage("{context_str} ?")])
    sizes = [
        kind(context_window=900, num_output=10, tokenizer=words)
        .get_text_splitter_given_prompt(chat)
        .chunk_size
        for kind in (BlockPromptHelper, PromptHelper)
    ]
    assert sizes[0] == sizes[1]


def test_each_text_is_counted_once():
    counted = []

    def count(text):
        counted.append(text)
        return words(text)

    packed = BlockPromptHelper(context_window=60, num_output=10, tokenizer=count)
    for _ in range(3):
        packed.repack(ASK, ["one passage", "another passage"])
    assert counted.count("one passage") == counted.count("another passage") == 1


def test_threads_may_share_a_helper():
    packed = helper(window=400)
    texts = [[f"passage {index} of {thread}" for index in range(20)] for thread in range(8)]
    with ThreadPoolExecutor(8) as pool:
        packs = list(pool.map(lambda each: [packed.repack(ASK, each) for _ in range(50)], texts))
    assert packs == [[["\n\n".join(each)]] * 50 for each in texts]


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "compact_accumulate"])
def test_in_a_window_too_small_for_all_passages_each_of_them_is_reused(mode):
    llm = tiny_llm(salt=f"small {mode}", context_window=1400, max_new_tokens=20, uses_hints=False)
    years = range(1850, 1868)
    letters = [f"In the year {year} the keeper wrote {year * 7919} letters to the harbour." for year in years]
    setup = Setup(llm, [TextNode(text=text) for text in letters])
    texts = [node.get_content("llm") for node in setup.nodes]
    llm.engine.get().prefill(texts)
    with recorded() as calls:
        setup.query_engine(response_mode=mode).query("When?")
    assert len(calls) > 1
    assert sum(call.counts["num_hits"] for call in calls) == len(texts)
    assert all(call.counts["prompt_tokens"] + 20 <= 1400 for call in calls)


def test_room_is_left_for_the_chat_template():
    llm = tiny_llm(max_new_tokens=10)
    around = TINY_TOKENIZER.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    helpers = [
        BlockPromptHelper(900, 10, tokenizer=tokenizer)
        for tokenizer in (Settings.tokenizer, TINY_TOKENIZER.tokenize)
    ]
    with_room, without = (each.get_text_splitter_given_prompt(ASK, llm=llm).chunk_size for each in helpers)
    assert without - with_room >= len(TINY_TOKENIZER.encode(around))

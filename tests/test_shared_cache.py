"""Handles on one cache: nothing is loaded before it is needed, and then once."""

from __future__ import annotations

import copy
import gc
import pickle
import threading

import pytest
import torch

import rag_blockcache.shared_cache as shared_cache
from rag_blockcache import BlockCache, Question, SharedCache
from rag_blockcache.errors import InvalidInputError, ModelNotFoundError
from rag_blockcache.passage_format import FORMATS

ASKED = Question("Who?", ["Ada wrote the note."])


def test_equal_arguments_share_a_cache_and_others_do_not(tiny_model_path, tmp_path):
    one = SharedCache(tiny_model_path, tmp_path / "kv", salt="a")
    same = SharedCache(str(tiny_model_path), str(tmp_path / "kv"), salt="a")
    assert one.get() is same.get()
    for other in (
        SharedCache(tiny_model_path, tmp_path / "kv", salt="b"),
        SharedCache(tiny_model_path, tmp_path / "other", salt="a"),
        SharedCache(tiny_model_path, None, salt="a"),
        SharedCache(tiny_model_path, tmp_path / "kv", salt="a", dtype=torch.bfloat16),
    ):
        assert other.get() is not one.get()


def test_an_option_left_out_is_the_one_by_default(tiny_model_path):
    one = SharedCache(tiny_model_path, None)
    assert one.get() is SharedCache(tiny_model_path, None, salt="", admission="always", device=None).get()


def test_a_loaded_model_is_equal_to_itself_alone(tiny_model, tiny_tokenizer, tiny_model_path):
    one, same = (SharedCache(tiny_model, None, tokenizer=tiny_tokenizer) for _ in range(2))
    assert one.get() is same.get()
    assert one.get() is not SharedCache(tiny_model_path, None).get()


def test_a_handle_is_cheap_and_knows_the_window_without_the_weights(tiny_model_path, monkeypatch):
    monkeypatch.setattr(shared_cache, "BlockCache", None)
    handles = [SharedCache(tiny_model_path, None, salt=str(number)) for number in range(100)]
    assert not any(handle.is_loaded for handle in handles)
    assert handles[0].context_window == 2048
    assert handles[0].has_chat_template
    assert handles[0].tokenizer("a").input_ids
    assert handles[0].model_name == str(tiny_model_path)
    assert not handles[0].is_loaded


def test_handles_with_equal_arguments_are_equal(tiny_model_path, tmp_path, monkeypatch):
    one = SharedCache(tiny_model_path, tmp_path / "kv", salt="a", dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    same = SharedCache(str(tiny_model_path), "kv", dtype=torch.float32, salt="a", device=None)
    assert one == same
    assert len({one, same, SharedCache(tiny_model_path, tmp_path / "kv", salt="b")}) == 2
    assert one != SharedCache(tiny_model_path, None, salt="a", dtype=torch.float32)
    assert one != "kv"


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))]
)
def test_a_handle_of_names_copies_to_an_equal_one(tiny_model_path, tmp_path, monkeypatch, duplicate):
    monkeypatch.chdir(tmp_path)
    chosen = {"dtype": torch.bfloat16, "passage_format": FORMATS["plain"], "disk_budget_bytes": 10**7}
    handle = SharedCache(tiny_model_path, "kv", **chosen)
    another = duplicate(handle)
    assert another == handle
    assert another.get() is handle.get()
    assert another.get().store.disk.directory == tmp_path / "kv" / "blocks"


def test_a_pickled_handle_opens_the_same_place_in_another_directory(tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(SharedCache(tiny_model_path, "kv"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickled).get().store.disk.directory == tmp_path / "kv" / "blocks"


def test_a_handle_on_a_loaded_model_copies_to_itself_and_is_not_pickled(tiny_model, tiny_tokenizer):
    handle = SharedCache(tiny_model, None, tokenizer=tiny_tokenizer)
    assert copy.copy(handle) is copy.deepcopy(handle) is copy.deepcopy({"engine": handle})["engine"] is handle
    with pytest.raises(InvalidInputError, match=r"a loaded LlamaForCausalLM cannot.* by hub id"):
        pickle.dumps(handle)


def test_a_handle_with_a_loaded_tokenizer_is_not_pickled(tiny_model_path, tiny_tokenizer):
    handle = SharedCache(tiny_model_path, None, tokenizer=tiny_tokenizer)
    with pytest.raises(InvalidInputError, match=r"a loaded Token\w+ cannot be pickled"):
        pickle.dumps(handle)


def test_many_threads_load_once(tiny_model_path, monkeypatch):
    made = []

    class Counted(BlockCache):
        def __init__(self, *args, **options):
            made.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(shared_cache, "BlockCache", Counted)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(SharedCache(tiny_model_path, None, salt="t").get()))
        for _ in range(8)
    ]
    handle = SharedCache(tiny_model_path, None, salt="t")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert set(map(id, found)) == {id(handle.get())}


def test_the_cache_goes_with_its_last_handle(tiny_model_path, tmp_path):
    handle = SharedCache(tiny_model_path, tmp_path / "kv")
    assert handle.answer(ASKED, max_new_tokens=1).num_misses == 1
    same = SharedCache(tiny_model_path, tmp_path / "kv")
    del handle
    gc.collect()
    assert same.is_loaded
    del same
    gc.collect()
    again = SharedCache(tiny_model_path, tmp_path / "kv")
    assert not again.is_loaded
    assert again.answer(ASKED, max_new_tokens=1).num_hits == 1


def test_a_closed_cache_is_loaded_again(tiny_model_path, tmp_path):
    handle = SharedCache(tiny_model_path, tmp_path / "kv")
    before = handle.get()
    handle.close()
    handle.close()
    assert handle.get() is not before


def test_errors_come_when_the_cache_is_needed_and_again(tmp_path, tiny_model_path):
    missing = SharedCache(tmp_path / "nothing", None)
    for _ in range(2):
        with pytest.raises(ModelNotFoundError, match="cannot load model"):
            missing.get()
    with pytest.raises(ModelNotFoundError, match="cannot read the configuration"):
        _ = missing.context_window
    with pytest.raises(InvalidInputError, match="unknown"):
        SharedCache(tiny_model_path, None, passage_format="none such").get()


async def test_all_ways_to_answer(tiny_model_path):
    handle = SharedCache(tiny_model_path, None)
    # Not "auto", which measures what pays, and takes now this policy and now that for so short a prompt.
    chosen = {"max_new_tokens": 4, "policy": "block"}
    answers = [
        handle.answer(ASKED, **chosen),
        *handle.answer_batch([ASKED], **chosen),
        await handle.aanswer(ASKED, **chosen),
    ]
    with handle.stream_answer(ASKED, **chosen) as stream:
        text = "".join(stream)
    pieces = [piece async for piece in handle.astream_answer(ASKED, **chosen)]
    assert {answer.text for answer in answers} == {text, "".join(pieces)}

"""Blocks that are used again are kept on the model's device: found there first, within a budget."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import architectures
import pytest
import torch
from store_blocks import is_same, make_block
from test_equivalence import PASSAGES, SHORT

from rag_blockcache import BlockCache
from rag_blockcache.device_tier import device_tier
from rag_blockcache.errors import InvalidInputError
from rag_blockcache.quantization import CODECS
from rag_blockcache.store import DeviceStore, DiskStore, MemoryStore, TieredStore

BLOCK_BYTES = make_block("a").num_bytes
HERE, ELSEWHERE = torch.device("cpu"), torch.device("cuda")  # where blocks of a test are, and are not


def copies_of(blocks):
    return [states.mapped(torch.clone) for states in blocks]


def device_store(limit_bytes=2**30, *, device=ELSEWHERE, copy=copies_of):
    return DeviceStore(device, copy, limit_bytes)


def blocks_named(names):
    return {name: make_block(name) for name in names}


@pytest.fixture
def store(tmp_path):
    with TieredStore(MemoryStore(), DiskStore(tmp_path), device_store()) as store:
        yield store


def test_admitted_blocks_are_copies_that_count():
    store, blocks = device_store(), blocks_named("ab")
    copies = store.admit(blocks)
    assert all(is_same(copies[name], states) for name, states in blocks.items())
    assert all(copies[name].keys.data_ptr() != states.keys.data_ptr() for name, states in blocks.items())
    assert store["a"] is copies["a"]
    assert store.get("c") is None
    stats = store.stats()
    assert (stats.num_blocks, stats.num_bytes, stats.size_limit_bytes) == (2, 2 * BLOCK_BYTES, 2**30)
    assert (stats.num_hits, stats.num_misses) == (1, 1)
    assert store.admit(blocks) == {}  # they are there


def test_what_is_used_least_goes_first_and_the_budget_holds():
    store = device_store(3 * BLOCK_BYTES)
    store.admit(blocks_named("abc"))
    store.get_many("ac")
    store.admit(blocks_named("d"))
    assert set(store) == set("acd")
    assert store.stats().num_evictions == 1
    assert list(store.admit(blocks_named("efgh"))) == list("efg")  # more than there is room for
    assert store.size_bytes == 3 * BLOCK_BYTES


def test_blocks_of_the_same_request_and_pinned_ones_do_not_go():
    store = device_store(3 * BLOCK_BYTES)
    store.pin(["a"])
    store.admit(blocks_named("abc"))
    assert list(store.admit(blocks_named("de"), beside=["b"])) == ["d"]
    assert set(store) == set("abd")


def test_a_block_larger_than_the_budget_is_left_where_it_is():
    store = device_store(BLOCK_BYTES - 1)
    assert store.admit(blocks_named("a")) == {}
    assert len(store) == store.size_bytes == 0


def test_blocks_that_are_there_already_stay_without_a_copy_where_there_is_room():
    store = device_store(2 * BLOCK_BYTES, device=HERE)
    blocks = blocks_named("abc")
    store.fill(blocks)
    assert set(store) == {"a", "b"}
    assert store["a"].keys.data_ptr() == blocks["a"].keys.data_ptr()
    store.fill(blocks_named("de"))
    assert set(store) == {"a", "b"}  # none goes for what is merely there
    elsewhere = device_store(device=ELSEWHERE)
    elsewhere.fill(blocks)
    assert len(elsewhere) == 0


def test_a_device_without_memory_takes_what_it_can_and_no_more_later(caplog):
    store = device_store(copy=lambda blocks: copies_of(blocks[:2]))
    assert list(store.admit(blocks_named("abcd"))) == ["a", "b"]
    assert "no memory left" in caplog.text
    assert store.size_limit_bytes == store.size_bytes == 2 * BLOCK_BYTES
    assert list(store.admit(blocks_named("cd"))) == ["c", "d"]  # in the place of the others
    assert store.size_bytes == 2 * BLOCK_BYTES


def test_threads_share_it_and_the_budget_holds():
    def copy_slowly(blocks):
        time.sleep(1e-3)
        return copies_of(blocks)

    store = device_store(4 * BLOCK_BYTES, copy=copy_slowly)
    largest = []

    def work(names):
        for _ in range(50):
            store.admit(blocks_named(names))
            largest.append(store.size_bytes)
            assert all(is_same(states, make_block(name)) for name, states in store.get_many(names).items())

    threads = [threading.Thread(target=work, args=(names,)) for names in ("abc", "cde", "efg", "gha")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(largest) == 200
    assert max(largest) <= 4 * BLOCK_BYTES
    assert sum(states.num_bytes for states in store.values()) == store.size_bytes


# Before other tiers


def test_a_block_moves_up_a_tier_with_each_use(store):
    store.put_many(blocks_named("ab"))
    store.memory.close()
    assert set(store.device) == set()
    on_disk = store["a"]
    assert (set(store.memory), set(store.device)) == ({"a"}, set())
    on_device = store["a"]
    assert on_device is store.device["a"]
    assert on_device.keys.data_ptr() != on_disk.keys.data_ptr()
    found = store.get_many("ba")
    assert list(found) == ["b", "a"]
    assert found["a"] is on_device
    assert store.memory.stats().num_hits == 1
    assert store.disk.use_counts() == {"a": 3, "b": 1}  # what is served above does not look idle


def test_a_prompt_larger_than_the_budget_keeps_its_part_on_the_device(tmp_path):
    with TieredStore(MemoryStore(), DiskStore(tmp_path), device_store(2 * BLOCK_BYTES)) as store:
        store.put_many(blocks_named("abc"))
        for _ in range(3):
            assert list(store.get_many("abc")) == list("abc")
            assert set(store.device) == {"a", "b"}
        assert store.device.stats().num_evictions == 0


def test_blocks_that_are_on_the_device_already_are_held_there_and_below(tmp_path):
    blocks = blocks_named("abc")
    device = device_store(2 * BLOCK_BYTES, device=HERE)
    with TieredStore(MemoryStore(), DiskStore(tmp_path), device) as store:
        assert store.put_many(blocks) == list(blocks)
        assert set(store.disk) == set(store.memory) == set(blocks)
        assert set(store.device) == {"a", "b"}
        assert store.keep_in_memory(blocks_named("d")) == ["d"]
        assert "d" not in store.disk
    with TieredStore(MemoryStore(0), None, device_store(device=HERE)) as store:
        assert store.put_many(blocks) == store.keep_in_memory(blocks) == []
        assert len(store) == 0  # the device holds nothing that no tier below it does


def test_deleting_a_block_deletes_it_from_the_device(store):
    store.put_many(blocks_named("abc"))
    store.get_many("abc")
    assert set(store.device) == set("abc")
    del store["a"]
    assert is_same(store.pop("b"), make_block("b"))
    assert set(store) == set(store.device) == {"c"}
    store.clear()
    assert len(store) == len(store.device) == 0


@pytest.mark.parametrize("delete", [TieredStore.__delitem__, lambda store, name: store.clear()])
def test_a_block_that_is_deleted_while_it_is_copied_does_not_stay(tmp_path, delete):
    def copy_slowly(blocks):
        delete(store, "a")
        return copies_of(blocks)

    with TieredStore(MemoryStore(), DiskStore(tmp_path), device_store(copy=copy_slowly)) as store:
        store["a"] = make_block("a")
        assert is_same(store["a"], make_block("a"))
        assert "a" not in store


def test_what_the_device_serves_does_not_look_idle_in_memory_where_that_is_the_lowest_tier():
    with TieredStore(MemoryStore(2 * BLOCK_BYTES), None, device_store()) as store:
        store.put_many(blocks_named("ab"))
        for _ in range(3):
            store["a"]
        store["b"]
        store["c"] = make_block("c")
        assert set(store.memory) == {"a", "c"}
        assert store.keeps("a")


def test_what_is_on_the_device_is_not_read_ahead(store):
    store.put_many(blocks_named("ab"))
    store.get_many("a")
    store.memory.close()
    assert store.prefetch("ab") == ["b"]


# In a cache


def test_a_cpu_keeps_no_blocks_apart(tiny_cache):
    assert tiny_cache.store.device is None
    assert tiny_cache.store.stats().device is None


def test_a_quarter_of_what_is_free_is_the_budget_unless_another_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 24 * 2**30))
    model = SimpleNamespace(device=ELSEWHERE, layers=[SimpleNamespace(device=ELSEWHERE)] * 2)
    assert device_tier(model, None, context_budget_bytes=2**30).size_limit_bytes == 2 * 2**30
    assert device_tier(model, None, context_budget_bytes=2**40).size_limit_bytes == 0
    assert device_tier(model, 1000, context_budget_bytes=0).size_limit_bytes == 1000
    assert device_tier(model, 0, context_budget_bytes=0) is None
    model.layers[1] = SimpleNamespace(device=torch.device("cuda:1"))  # as device_map="auto" does
    assert device_tier(model, None, context_budget_bytes=0) is None


def test_a_negative_budget_is_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(InvalidInputError, match="device_budget_bytes is -1"):
        BlockCache(tiny_model, None, tokenizer=tiny_tokenizer, device_budget_bytes=-1)


def open_cache(network, tokenizer, directory, *, device=None, **options):
    cache = BlockCache(
        network, directory, tokenizer=tokenizer, passage_format=SHORT, context_budget_bytes=0, **options
    )
    cache.store.device = device
    return cache


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("directory", ["disk", None])
def test_answers_are_the_same_from_the_device(codec, directory, tiny_model, tiny_tokenizer, tmp_path):
    path = None if directory is None else tmp_path / directory
    options = {"policy": "block", "max_new_tokens": 8, "do_sample": False}
    with open_cache(tiny_model, tiny_tokenizer, None, codec=codec) as cache:
        expected = cache.generate("Who?", PASSAGES, **options)
        logits = cache.first_logits("Who?", PASSAGES, policy="block")
    with open_cache(tiny_model, tiny_tokenizer, path, codec=codec, device=device_store()) as cache:
        for _ in range(3):
            assert cache.generate("Who?", PASSAGES, **options).token_ids == expected.token_ids
        stats = cache.store.stats().device
        assert stats.num_hits >= len(PASSAGES)
        assert stats.num_blocks >= len(PASSAGES)
        assert torch.equal(cache.first_logits("Who?", PASSAGES, policy="block"), logits)
        cache.forget(PASSAGES)
        assert not any(cache.block(text).block_id in cache.store.device for text in PASSAGES)
        assert cache.generate("Who?", PASSAGES, **options).num_hits == 0


@pytest.mark.parametrize("name", architectures.ACCEPTED)
def test_every_architecture_answers_the_same_from_the_device(name, tiny_tokenizer, tmp_path):
    network = architectures.accepted(name)
    with open_cache(network, tiny_tokenizer, tmp_path, device=device_store()) as cache:
        from_disk, from_memory, from_device = (
            cache.first_logits("Who?", PASSAGES[:3], policy="block") for _ in range(3)
        )
        assert cache.store.device.stats().num_hits >= 3
    assert torch.equal(from_memory, from_disk)
    assert torch.equal(from_device, from_disk)


def test_a_passage_on_probation_is_stored_when_the_device_serves_it(tiny_model, tiny_tokenizer, tmp_path):
    options = {"policy": "block", "max_new_tokens": 2}
    device = device_store(device=HERE)
    with open_cache(tiny_model, tiny_tokenizer, tmp_path, admission="frequency", device=device) as cache:
        name = cache.block(PASSAGES[0]).block_id
        cache.generate("Who?", PASSAGES[:1], **options)
        assert name in device
        assert name not in cache.store.disk
        assert cache.generate("Who?", PASSAGES[:1], **options).num_hits == 1
        assert name in cache.store.disk

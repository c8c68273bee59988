"""Memory tier: a mapping with a budget, and the eviction rule that the disk shares."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_blocks import is_same, make_block

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.kv_states import KVStates
from rag_blockcache.store import MemoryStore
from rag_blockcache.store.batches import new_blocks, next_batch
from rag_blockcache.store.eviction import priority

BLOCK_BYTES = make_block("a").num_bytes


def test_a_block_comes_back_as_it_was_put_without_a_copy():
    store = MemoryStore()
    states = make_block("a")
    store["a"] = states
    assert store["a"].keys.data_ptr() == states.keys.data_ptr()
    assert is_same(store["a"], states)
    assert list(store) == ["a"]
    assert len(store) == 1
    assert "b" not in store
    assert store.size_bytes == states.num_bytes


def test_a_missing_block_is_a_key_error():
    store = MemoryStore()
    with pytest.raises(KeyError):
        store["a"]
    with pytest.raises(KeyError):
        del store["a"]
    with pytest.raises(KeyError):
        store.verify("a")
    assert store.get("a") is None


def test_a_window_on_a_larger_tensor_is_copied_so_that_the_rest_can_go():
    batch = torch.randn(2, 3, 4096, 8)
    store = MemoryStore()
    store["a"] = KVStates(batch[:, :, :4], batch[:, :, 4:8])
    assert store["a"].keys.untyped_storage().nbytes() == store["a"].keys.nbytes
    assert torch.equal(store["a"].values, batch[:, :, 4:8])


def test_the_least_used_block_is_evicted_first():
    store = MemoryStore(3 * BLOCK_BYTES)
    for name in "abc":
        store[name] = make_block(name)
    assert store.get_many(["a", "c"]).keys() == {"a", "c"}
    store["d"] = make_block("d")
    assert set(store) == {"a", "c", "d"}
    assert store.stats().num_evictions == 1


def test_the_cheapest_block_is_evicted_first():
    store = MemoryStore(2 * BLOCK_BYTES)
    store.put("dear", make_block("dear"), cost_seconds=2.0)
    store.put("cheap", make_block("cheap"), cost_seconds=0.1)
    store.put("new", make_block("new"), cost_seconds=1.0)
    assert set(store) == {"dear", "new"}


def test_a_large_block_is_evicted_before_small_ones_of_the_same_cost():
    store = MemoryStore(6 * BLOCK_BYTES)
    store.put("large", make_block("large", num_tokens=16), cost_seconds=1.0)
    store.put("small", make_block("small"), cost_seconds=1.0)
    store.put("new", make_block("new", num_tokens=8), cost_seconds=1.0)
    assert set(store) == {"small", "new"}


def test_what_was_popular_once_sinks_below_what_is_in_use():
    store = MemoryStore(2 * BLOCK_BYTES)
    store["old"] = make_block("old")
    for _ in range(5):
        store["old"]
    for index in range(20):
        store[f"new {index}"] = make_block(f"new {index}")
    assert "old" not in store


def test_pinned_blocks_stay():
    store = MemoryStore(2 * BLOCK_BYTES)
    store.pin(["a"])
    for name in "abcdef":
        store[name] = make_block(name)
    assert set(store) == {"a", "f"}
    store.unpin(["a"])
    store["g"] = make_block("g")
    assert set(store) == {"f", "g"}


def test_a_block_larger_than_the_budget_is_not_kept_and_evicts_nothing():
    store = MemoryStore(2 * BLOCK_BYTES)
    store["a"] = make_block("a")
    assert not store.put("huge", make_block("huge", num_tokens=100))
    assert list(store) == ["a"]
    assert MemoryStore(0).put_many({"a": make_block("a")}) == []


def test_what_pinned_blocks_leave_free_is_the_limit_for_others():
    store = MemoryStore(3 * BLOCK_BYTES)
    store.pin("ab")
    assert store.put_many((name, make_block(name)) for name in "abc") == ["a", "b", "c"]
    assert not store.put("two", make_block("two", num_tokens=8))
    assert set(store) == {"a", "b", "c"}


def test_hits_and_misses_are_counted():
    store = MemoryStore()
    store["a"] = make_block("a")
    store.get("a")
    store.get("b")
    assert "a" in store  # asking is no use
    stats = store.stats()
    assert (stats.num_hits, stats.num_misses, stats.num_blocks, stats.num_bytes) == (1, 1, 1, BLOCK_BYTES)
    assert stats.hit_ratio == 0.5


def test_a_negative_budget_is_refused():
    with pytest.raises(InvalidInputError, match="size_limit_bytes is -1"):
        MemoryStore(-1)


def test_keys_and_values_that_do_not_match_are_refused():
    with pytest.raises(InvalidInputError, match="of one type"):
        MemoryStore()["a"] = KVStates(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4))


def test_the_cost_of_a_batch_is_shared_by_tokens():
    blocks = new_blocks({"a": make_block("a", 6), "b": make_block("b", 2)}, cost_seconds=4.0)
    assert [block.cost_seconds for block in blocks] == [3.0, 1.0]
    unknown = new_blocks({"a": make_block("a", 6), "b": make_block("b", 2)}, cost_seconds=0.0)
    assert unknown[0].cost_seconds == 3 * unknown[1].cost_seconds


def test_priority_follows_its_formula():
    assert priority(clock=1.0, num_uses=3, cost_seconds=2.0, num_bytes=12) == 1.5
    assert priority(clock=1.0, num_uses=1, cost_seconds=2.0, num_bytes=0) == 3.0


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(0, 20_000))
@settings(max_examples=50, deadline=None)
def test_batches_fit_and_leave_out_only_what_never_fits(lengths, room):
    rest = new_blocks([(str(i), make_block(str(i), length)) for i, length in enumerate(lengths)], 0.0)
    sizes = {block.block_id: 4096 + block.states.num_bytes for block in rest}
    placed = []
    while rest:
        batch, rest = next_batch(rest, room)
        assert batch or not rest
        assert sum(sizes[block.block_id] for block in batch) <= room
        placed += [block.block_id for block in batch]
    assert placed == [block_id for block_id, size in sizes.items() if size <= room]


@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["put", "get", "del", "pin", "unpin"])))
)
@settings(max_examples=100, deadline=None)
def test_whatever_happens_the_budget_holds_and_blocks_are_right(operations):
    limit = 5 * BLOCK_BYTES
    store = MemoryStore(limit)
    lengths = dict(zip("abcdefgh", [1, 2, 3, 4, 6, 8, 12, 24], strict=True))
    for name, operation in operations:
        if operation == "put":
            store[name] = make_block(name, lengths[name])
        elif operation == "get":
            assert name not in store or is_same(store[name], make_block(name, lengths[name]))
        elif operation == "del":
            store.pop(name, None)
        else:
            getattr(store, operation)([name])
        assert store.size_bytes == sum(make_block(held, lengths[held]).num_bytes for held in store) <= limit


def test_threads_may_share_it():
    store = MemoryStore(4 * BLOCK_BYTES)
    wrong = []

    def work(seed: int) -> None:
        for step in range(200):
            name = str((seed * 7 + step * 3) % 11)
            states = store.get(name)
            if states is None:
                store[name] = make_block(name)
            elif not is_same(states, make_block(name)):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.size_bytes == sum(states.num_bytes for states in store.values()) <= 4 * BLOCK_BYTES


def test_tensors_stay_valid_when_the_store_is_closed():
    with MemoryStore() as store:
        store["a"] = make_block("a")
        states = store["a"]
        store.flush()
    assert len(store) == 0
    assert is_same(states, make_block("a"))

"""Device before memory before disk: each block is found where it is soonest, and damage is a miss."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_blocks import is_same, make_block

from rag_blockcache.errors import CorruptBlockError, InvalidInputError
from rag_blockcache.store import DeviceStore, DiskStore, MemoryStore, TieredStore
from rag_blockcache.store.block_file import stored_bytes

BLOCK_BYTES = make_block("a").num_bytes
FILE_BYTES = stored_bytes(make_block("a"))


@pytest.fixture
def store(tmp_path):
    with TieredStore(MemoryStore(), DiskStore(tmp_path)) as store:
        yield store


def damage(disk: DiskStore, block_id: str) -> None:
    os.truncate(disk._index.path(disk._index.name_of(block_id)), 5000)


def test_a_block_is_written_to_both_tiers(store):
    assert store.put("a", make_block("a"), cost_seconds=1.0)
    assert "a" in store.memory
    assert "a" in store.disk
    assert is_same(store["a"], make_block("a"))
    assert store.disk.stats().num_hits == 0


def test_what_comes_from_disk_stays_in_memory_as_it_was_mapped(store):
    store["a"] = make_block("a")
    store.memory.close()
    first = store["a"]
    assert store.memory["a"].keys.data_ptr() == first.keys.data_ptr()
    assert store["a"].keys.data_ptr() == first.keys.data_ptr()
    assert store.disk.stats().num_hits == 1


def test_several_blocks_come_in_the_order_asked_for_from_wherever_they_are(store):
    assert store.put_many({name: make_block(name) for name in "abcd"}) == list("abcd")
    for name in "bd":
        del store.memory[name]
    del store.disk["c"]
    found = store.get_many(["d", "x", "c", "b", "d", "a"])
    assert list(found) == ["d", "c", "b", "a"]
    assert all(is_same(states, make_block(name)) for name, states in found.items())
    assert set(store.memory) == set("abcd")


def test_a_missing_block_is_a_key_error(store):
    with pytest.raises(KeyError):
        store["a"]
    with pytest.raises(KeyError):
        del store["a"]
    assert store.get("a") is None


def test_a_damaged_block_is_a_miss_and_can_be_stored_again(store, caplog):
    store.put_many({name: make_block(name) for name in "ab"})
    store.memory.close()
    damage(store.disk, "a")
    damage(store.disk, "b")
    with pytest.raises(CorruptBlockError, match="block a"):
        store.verify("a")
    assert store.get("a") is None
    assert store.get_many(["b"]) == {}
    assert "block a" in caplog.text
    assert len(store) == 0
    store["a"] = make_block("a")
    assert is_same(store["a"], make_block("a"))


def test_deleting_a_block_deletes_it_from_every_tier(store):
    store.put_many({name: make_block(name) for name in "abc"})
    del store["a"]
    assert "a" not in store
    del store.memory["b"]
    del store["b"]
    assert list(store) == ["c"]
    states = store["c"]
    store.clear()
    assert len(store) == store.size_bytes == 0
    assert is_same(states, make_block("c"))


@pytest.mark.parametrize("read", [TieredStore.__getitem__, TieredStore.get_many])
def test_what_memory_serves_does_not_look_idle_on_disk(tmp_path, read):
    with TieredStore(MemoryStore(), DiskStore(tmp_path, size_limit_bytes=3 * FILE_BYTES)) as store:
        store.put_many({name: make_block(name) for name in "abc"})
        read(store, "a")  # the oldest, which would go first
        store["d"] = make_block("d")
        assert store.disk.stats().num_hits == 0
        assert set(store.disk) == {"a", "c", "d"}


def test_what_the_disk_evicts_memory_may_still_have(tmp_path):
    with TieredStore(MemoryStore(), DiskStore(tmp_path, size_limit_bytes=FILE_BYTES)) as store:
        store["a"] = make_block("a")
        store["b"] = make_block("b")
        assert list(store.disk) == ["b"]
        assert set(store) == {"a", "b"}
        assert len(store) == 2
        assert store.size_bytes == FILE_BYTES


def test_pins_hold_in_every_tier(tmp_path):
    tiers = MemoryStore(2 * BLOCK_BYTES), DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES)
    with TieredStore(*tiers) as store:
        store.pin(iter(["a"]))
        for name in "abcd":
            store[name] = make_block(name)
        assert all(set(tier) == {"a", "d"} for tier in tiers)
        store.unpin(iter(["a"]))
        store["e"] = make_block("e")
        assert all(set(tier) == {"d", "e"} for tier in tiers)


@pytest.mark.parametrize("memory", [None, MemoryStore(0)])
def test_memory_may_be_left_out(tmp_path, memory):
    with TieredStore(memory, DiskStore(tmp_path)) as store:
        store["a"] = make_block("a")
        assert is_same(store["a"], make_block("a"))
        assert is_same(store.get_many(["a"])["a"], make_block("a"))
        assert store.disk.stats().num_hits == 2
        assert (store.stats().memory is None) == (memory is None)


def test_the_disk_may_be_left_out():
    with TieredStore(MemoryStore(), None) as store:
        assert store.put("a", make_block("a"), cost_seconds=1.0)
        assert is_same(store["a"], make_block("a"))
        assert store.get_many(["a", "b"]).keys() == {"a"}
        assert store.get("b") is None
        store.verify("a")
        store.flush()
        assert store.size_bytes == BLOCK_BYTES
        assert store.stats().disk is None


def test_a_store_without_tiers_is_refused():
    with pytest.raises(InvalidInputError, match="pass one of them"):
        TieredStore(None, None)


def test_each_tier_counts_for_itself(store):
    store.put_many({name: make_block(name) for name in "ab"})
    store.memory.close()
    store.get_many("abx")
    store.get("a")
    stats = store.stats()
    assert (stats.memory.num_hits, stats.memory.num_misses) == (1, 3)
    assert (stats.disk.num_hits, stats.disk.num_misses) == (2, 1)
    assert (stats.memory.num_bytes, stats.disk.num_bytes) == (2 * BLOCK_BYTES, 2 * FILE_BYTES)


class TieredStoreMachine(RuleBasedStateMachine):
    """Whatever happens to the tiers above the disk, the store is a dict."""

    disk: DiskStore  # set by the test
    names = st.sampled_from("abcdef")

    limits = st.sampled_from([None, 0, 2 * BLOCK_BYTES, 5 * BLOCK_BYTES])

    @initialize(memory_bytes=limits, device_bytes=limits, device=st.sampled_from(["cpu", "cuda"]))
    def open_store(self, memory_bytes, device_bytes, device):
        self.memory_bytes, self.device_bytes = memory_bytes, device_bytes
        self.disk.clear()
        memory = MemoryStore(memory_bytes) if memory_bytes is not None else None
        above = DeviceStore(torch.device(device), list, device_bytes) if device_bytes is not None else None
        self.store = TieredStore(memory, self.disk, above)
        self.model = {}

    @rule(names=st.lists(names, max_size=4))
    def put_many(self, names):
        blocks = {name: make_block(name) for name in names}
        assert self.store.put_many(blocks) == list(blocks)
        self.model |= blocks

    @rule(names=st.lists(names, max_size=4))
    def get_many(self, names):
        found = self.store.get_many(names)
        assert list(found) == [name for name in dict.fromkeys(names) if name in self.model]
        assert all(is_same(states, self.model[name]) for name, states in found.items())

    @rule(name=names)
    def get(self, name):
        states = self.store.get(name)
        assert (states is None) if name not in self.model else is_same(states, self.model[name])

    @rule(name=names)
    def delete(self, name):
        assert (self.store.pop(name, None) is None) == (self.model.pop(name, None) is None)

    @rule()
    def lose_memory(self):
        if self.store.memory is not None:
            self.store.memory.close()

    @rule()
    def lose_device(self):
        if self.store.device is not None:
            self.store.device.close()

    @invariant()
    def is_a_dict(self):
        assert set(self.store) == self.model.keys()
        assert len(self.store) == len(self.model)
        if self.memory_bytes is not None:
            assert self.store.memory.size_bytes <= self.memory_bytes
        if self.device_bytes is not None:
            assert self.store.device.size_bytes <= self.device_bytes


def test_any_sequence_of_operations(tmp_path):
    with DiskStore(tmp_path) as disk:
        machine = type("Machine", (TieredStoreMachine,), {"disk": disk})
        case = machine.TestCase()
        case.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
        case.runTest()

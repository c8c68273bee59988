"""Disk tier: whole blocks or misses, whatever happens to the directory and to those who write in it."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors import safe_open
from safetensors.torch import save_file
from store_blocks import is_same, make_block

from rag_blockcache import workers
from rag_blockcache.errors import CorruptBlockError, InvalidInputError, OutOfSpaceError, StoreError
from rag_blockcache.kv_states import KVStates
from rag_blockcache.store import DiskStore
from rag_blockcache.store import disk as disk_module
from rag_blockcache.store.block_directory import locked
from rag_blockcache.store.block_file import HEADER_BYTES, stored_bytes
from rag_blockcache.store.raw_disk import ForeignEntryError

FILE_BYTES = stored_bytes(make_block("a"))


@pytest.fixture
def store(tmp_path):
    with DiskStore(tmp_path / "blocks") as store:
        yield store


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("??/*"))


def file_of(store: DiskStore, block_id: str) -> Path:
    return store._index.path(store._index.name_of(block_id))


def reopened(store: DiskStore, **options: int) -> DiskStore:
    """Close the store, and open it as another process would, with nothing checked yet."""
    store.close()
    return DiskStore(store.directory, **options)


# A mapping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_comes_back_as_it_was_put(store, dtype):
    states = make_block("a", dtype=dtype)
    store["a"] = states
    assert is_same(store["a"], states)
    assert is_same(reopened(store)["a"], states)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 1000])
def test_blocks_of_any_length_come_back(store, num_tokens):
    store["a"] = make_block("a", num_tokens)
    assert store["a"].keys.shape == (2, 3, num_tokens, 8)
    assert is_same(store["a"], make_block("a", num_tokens))


def test_tensors_that_lie_apart_in_memory_come_back_whole(store):
    batch = torch.randn(2, 3, 20, 8).requires_grad_()
    store["a"] = KVStates(batch[:, :, 3:9], batch.transpose(2, 3).contiguous().transpose(2, 3)[:, :, 9:15])
    assert torch.equal(store["a"].keys, batch[:, :, 3:9])
    assert torch.equal(store["a"].values, batch[:, :, 9:15])


def test_a_missing_block_is_a_key_error(store):
    for read in (store.__getitem__, store.__delitem__, store.verify):
        with pytest.raises(KeyError, match="a"):
            read("a")
    assert store.get("a") is None
    assert "a" not in store
    assert 7 not in store
    assert store.get_many(["a"]) == {}


@pytest.mark.parametrize("block_id", ["", "x" * 64, "../../etc/passwd", "ä 🦕 ' \" \n\0", "a/b"])
def test_any_string_may_name_a_block(store, block_id):
    store[block_id] = make_block(block_id)
    assert is_same(reopened(store)[block_id], make_block(block_id))
    assert list(store) == [block_id]
    del store[block_id]
    assert files_of(store.directory) == []


def test_a_popped_block_is_gone_and_its_tensors_stay(store):
    store["a"] = make_block("a")
    assert is_same(store.pop("a"), make_block("a"))
    assert store.pop("a", None) is None
    with pytest.raises(KeyError):
        store.pop("a")


def test_popping_is_not_disturbed_by_somebody_who_deletes_the_same_block(store, monkeypatch):
    store["a"] = make_block("a")
    original = disk_module.read_block

    def delete_and_read(*args, **options):
        states = original(*args, **options)
        del store["a"]
        return states

    monkeypatch.setattr(disk_module, "read_block", delete_and_read)
    assert is_same(store.pop("a", None), make_block("a"))


def test_only_a_string_may_name_a_block(store):
    with pytest.raises(TypeError, match="block ids are strings, not tuple"):
        store[("a",)] = make_block("a")
    with pytest.raises(InvalidInputError, match="too long"):
        store["x" * 5000] = make_block("a")
    assert files_of(store.directory) == []


def test_states_that_cannot_be_stored_are_refused_before_anything_is_written(store):
    integers = torch.zeros(2, 3, 4, 8, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match="convert it"):
        store.put_many({"a": make_block("a"), "b": KVStates(integers, integers)})
    with pytest.raises(InvalidInputError, match="block b has keys"):
        store["b"] = KVStates(torch.zeros(3), torch.zeros(3))
    assert len(store) == 0


def test_storing_a_block_again_writes_nothing(store):
    store["a"] = make_block("a")
    before = file_of(store, "a").stat()
    store["a"] = make_block("a")
    assert files_of(store.directory) == [file_of(store, "a")]
    assert file_of(store, "a").stat() == before


def test_many_blocks_are_stored_in_one_transaction(store, monkeypatch):
    transactions = []
    original = store._index.transact
    monkeypatch.setattr(store._index, "transact", lambda: transactions.append(1) or original())
    blocks = {str(i): make_block(str(i)) for i in range(20)}
    assert store.put_many(blocks) == list(blocks)
    assert len(transactions) == 1
    found = store.get_many(["7", "none", "3", "7"])
    assert list(found) == ["7", "3"]
    assert is_same(found["3"], blocks["3"])


def test_deleted_blocks_leave_no_file(store):
    store.put_many({name: make_block(name) for name in "abc"})
    del store["b"]
    assert set(store) == {"a", "c"}
    assert len(files_of(store.directory)) == 2
    store.clear()
    assert len(store) == store.size_bytes == 0
    assert files_of(store.directory) == []


# A memory map


def test_tensors_are_views_of_the_mapped_file(store):
    store["a"] = make_block("a", 1000)
    states = store["a"]
    if sys.platform == "linux":
        assert file_of(store, "a").name in Path("/proc/self/maps").read_text()
    assert states.keys.data_ptr() % 64 == 0  # tensors begin on a page of their own
    assert states.values.data_ptr() == states.keys.data_ptr() + states.keys.nbytes


def test_tensors_stay_valid_when_their_block_is_deleted(store):
    store["a"] = make_block("a", 1000)
    states = store["a"]
    store.clear()
    shutil.rmtree(store.directory)
    assert is_same(states, make_block("a", 1000))


def test_writing_to_a_tensor_does_not_reach_the_file(store):
    store["a"] = make_block("a")
    store["a"].keys.zero_()
    store.verify("a")
    assert is_same(store["a"], make_block("a"))


def test_open_blocks_hold_no_file_descriptors(store):
    store.put_many({str(i): make_block(str(i)) for i in range(50)})
    before = len(os.listdir("/dev/fd"))
    held = store.get_many(store)
    assert len(held) == 50
    assert len(os.listdir("/dev/fd")) <= before


def test_the_file_is_safetensors_as_documented(store):
    states = make_block("a", dtype=torch.bfloat16)
    store["a"] = states
    path = file_of(store, "a")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert torch.equal(file.get_tensor("values"), states.values)
    assert metadata.keys() == {"block_id", "format_version", "checksum", "codec"}
    assert (metadata["block_id"], metadata["format_version"], metadata["codec"]) == ("a", "1", "none")


def test_whoever_knows_only_the_documented_format_can_read_a_block(store):
    states = make_block("a")
    store["a"] = states
    store.close()
    connection = sqlite3.connect(store.directory / "cache.db")
    query = "SELECT filename, size FROM Cache WHERE key = ? AND raw = 1 AND mode = 2"
    ((filename, size),) = connection.execute(query, ("a",)).fetchall()
    connection.close()
    content = (store.directory / filename).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[4096:]
    assert (length, len(content)) == (4088, size)
    assert header["__metadata__"]["checksum"] == xxhash.xxh3_128_hexdigest(data)
    for name, tensor in (("keys", states.keys), ("values", states.values)):
        start, end = header[name]["data_offsets"]
        found = np.frombuffer(data[start:end], "<f4").reshape(header[name]["shape"])
        assert header[name]["dtype"] == "F32"
        assert np.array_equal(found, tensor.numpy())


# Damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_a_bit(path: Path, offset: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def flip_a_bit_of_the_keys(path: Path) -> None:
    flip_a_bit(path, HEADER_BYTES)


def flip_a_bit_of_the_header(path: Path) -> None:
    flip_a_bit(path, 9)


def overwrite_with_another_block(path: Path) -> None:
    other = max(files_of(path.parent.parent), key=lambda file: file != path)
    path.write_bytes(other.read_bytes())


def overwrite_with_a_foreign_file(path: Path) -> None:
    path.write_bytes(b"not a block" * 100)


def overwrite_with_foreign_tensors(path: Path) -> None:
    save_file({"keys": torch.zeros(2), "weights": torch.zeros(2)}, path)


def overwrite_with_a_block_of_integers(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    zeros = torch.zeros(2, 3, 4, 8, dtype=torch.int32)
    save_file({"keys": zeros, "values": zeros.clone()}, path, metadata)


def overwrite_with_shapes_that_differ(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"keys": torch.zeros(2, 3, 4, 8), "values": torch.zeros(2, 3, 5, 8)}, path, metadata)


DAMAGES = [
    truncate,
    empty,
    append,
    flip_a_bit,
    flip_a_bit_of_the_keys,
    flip_a_bit_of_the_header,
    overwrite_with_another_block,
    overwrite_with_a_foreign_file,
    overwrite_with_foreign_tensors,
    overwrite_with_a_block_of_integers,
    overwrite_with_shapes_that_differ,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_reported_by_name_logged_and_dropped(store, damage, caplog):
    store.put_many({name: make_block(name) for name in ("good", "bad")})
    damage(file_of(store, "bad"))
    fresh = reopened(store)
    with pytest.raises(CorruptBlockError, match=r"block bad in .* is damaged .* encode its passage again"):
        fresh["bad"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "block bad" in caplog.text
    assert list(fresh) == ["good"]
    assert fresh.size_bytes == FILE_BYTES
    assert len(files_of(fresh.directory)) == 1
    fresh["bad"] = make_block("bad")
    assert is_same(fresh["bad"], make_block("bad"))


def test_damaged_blocks_are_left_out_where_several_are_asked_for(store, caplog):
    store.put_many({name: make_block(name) for name in "abc"})
    flip_a_bit(file_of(store, "b"))
    fresh = reopened(store)
    assert fresh.get_many("abc").keys() == {"a", "c"}
    assert "block b" in caplog.text
    assert set(fresh) == {"a", "c"}


def test_sizes_are_checked_at_every_load(store):
    store["a"] = make_block("a")
    assert store["a"].num_tokens == 4
    truncate(file_of(store, "a"))
    with pytest.raises(CorruptBlockError, match="block a"):
        store["a"]


def test_the_checksum_is_compared_at_the_first_load_of_each_file_only(store, monkeypatch):
    checks = []
    original = disk_module.read_block
    monkeypatch.setattr(
        disk_module, "read_block", lambda *args, check: checks.append(check) or original(*args, check=check)
    )
    store["a"] = make_block("a")
    for _ in range(3):
        store["a"]
    del store["a"]
    store["a"] = make_block("a")  # in another file
    store["a"]
    assert checks == [True, False, False, True]


def test_verify_compares_the_checksum_again_and_leaves_the_block(store):
    store["a"] = make_block("a")
    assert store["a"].num_tokens == 4
    store.verify("a")
    flip_a_bit(file_of(store, "a"))
    with pytest.raises(CorruptBlockError, match="block a"):
        store.verify("a")
    assert "a" in store


def test_a_block_whose_file_is_gone_is_a_miss_and_can_be_stored_again(store):
    store["a"] = make_block("a")
    file_of(store, "a").unlink()
    assert store.get("a") is None
    store["a"] = make_block("a")
    assert is_same(store["a"], make_block("a"))
    assert store.size_bytes == FILE_BYTES


def test_repair_deletes_files_without_block_and_blocks_without_file(store):
    store.put_many({name: make_block(name) for name in "abc"})
    file_of(store, "b").unlink()
    folder = store.directory / "00"
    folder.mkdir(exist_ok=True)
    orphan = folder / f"{'0' * 30}.safetensors"
    orphan.write_bytes(b"half a block")
    notes = folder / "notes.txt"
    notes.write_text("not ours")
    assert store.repair() == ["b"]
    assert not orphan.exists()
    assert notes.exists()
    assert set(store) == {"a", "c"}
    assert store.size_bytes == 2 * FILE_BYTES
    assert store.repair() == []


def test_opening_leaves_files_alone_that_another_process_is_about_to_enter(store):
    (store.directory / "00").mkdir(exist_ok=True)
    unfinished = store.directory / "00" / f"{'0' * 30}.safetensors"
    unfinished.write_bytes(b"half a block")
    with locked(store.directory, exclusive=False):  # as a writer holds it
        DiskStore(store.directory).close()
        assert unfinished.exists()
    DiskStore(store.directory).close()
    assert not unfinished.exists()


def test_opening_a_store_does_not_disturb_one_who_is_writing(store, monkeypatch):
    original = disk_module.write_block

    def write_and_open(*args):
        original(*args)
        DiskStore(store.directory).close()

    monkeypatch.setattr(disk_module, "write_block", write_and_open)
    store.put_many({name: make_block(name) for name in "ab"})
    assert all(is_same(store[name], make_block(name)) for name in "ab")


def test_of_two_who_write_one_block_the_first_wins(store, monkeypatch):
    names = []
    original = disk_module.write_block

    def come_second(*args):
        original(*args)
        if not names:
            names.append("")
            with DiskStore(store.directory) as other:
                other["a"] = make_block("a")
                names[:] = [other._index.name_of("a")]

    monkeypatch.setattr(disk_module, "write_block", come_second)
    assert store.put("a", make_block("a"))
    assert store._index.name_of("a") == names[0]
    check_accounts(store)


def test_blocks_of_a_batch_are_written_side_by_side(store, monkeypatch):
    original, both = disk_module.write_block, threading.Barrier(2)

    def meet(*args):
        both.wait(10)
        original(*args)

    monkeypatch.setattr(disk_module, "write_block", meet)
    monkeypatch.setattr(workers, "num_cores", lambda: 2)
    store.put_many({name: make_block(name) for name in "abcd"})
    assert all(is_same(store[name], make_block(name)) for name in "abcd")
    check_accounts(store)


# Stored data is data


class Bomb:
    """Something that leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def plant(
    directory: Path, key: object, raw: int, mode: int, filename: str | None, value: bytes | None
) -> None:
    connection = sqlite3.connect(directory / "cache.db")
    with connection:
        connection.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, size, mode, filename, value)"
            " VALUES (?, ?, 0, 0, 1000000, ?, ?, ?)",
            (key, raw, mode, filename, value),
        )
    connection.close()


def test_a_planted_pickle_is_refused_and_not_executed(store, tmp_path, caplog):
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    (store.directory / "aa").mkdir()
    pickled = store.directory / "aa" / f"{'a' * 30}.safetensors"
    pickled.write_bytes(bomb)
    store["good"] = make_block("good")
    plant(store.directory, "in a row", 1, 4, None, bomb)
    plant(store.directory, "in a file", 1, 4, f"aa/{pickled.name}", None)
    plant(store.directory, bomb, 0, 2, None, None)
    for name in ("in a row", "in a file"):
        with pytest.raises(CorruptBlockError, match=f"block {name} .* dropped unread"):
            store[name]
    assert list(store) == ["good"]
    store["in a row"] = make_block("in a row")
    assert is_same(store["in a row"], make_block("in a row"))
    assert store.get_many(store).keys() == {"good", "in a row"}
    with pytest.raises(ForeignEntryError, match="key is not a string"):
        list(iter(store._index))
    store.repair()
    assert store.size_bytes == 2 * FILE_BYTES
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["relative", "absolute", "link", "index"])
def test_an_entry_cannot_reach_outside_the_directory(store, tmp_path, kind):
    store["good"] = make_block("good")
    outside = tmp_path / f"{'b' * 30}.safetensors"
    shutil.copy(file_of(store, "good"), outside)
    if kind == "link":
        (store.directory / "bb").symlink_to(tmp_path)
    names = {"relative": f"../{outside.name}", "absolute": str(outside), "index": "cache.db"}
    plant(store.directory, "bad", 1, 2, names.get(kind, f"bb/{outside.name}"), None)
    with pytest.raises(CorruptBlockError, match="block bad"):
        store["bad"]
    plant(store.directory, "bad", 1, 2, names.get(kind, f"bb/{outside.name}"), None)
    fresh = reopened(store)
    assert list(fresh.get_many(["bad", "good"])) == ["good"]
    fresh.clear()
    assert outside.exists()
    assert (store.directory / "cache.db").exists()


# The directory


def test_the_directory_is_created_for_its_owner_only(tmp_path):
    with DiskStore(tmp_path / "deep" / "blocks") as store:
        store["a"] = make_block("a")
        assert store.directory.stat().st_mode & 0o777 == 0o700
        assert file_of(store, "a").parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_holds_something_else_is_refused_and_left_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"holds other files \(thesis.tex\).*choose an empty or a new"):
        DiskStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_cache_of_another_program_is_refused(tmp_path):
    sqlite3.connect(tmp_path / "cache.db").close()
    with pytest.raises(StoreError, match="not a block store"):
        DiskStore(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"format": "rag_blockcache blocks", "version": 99}),
            "format version 99, this .* prefill",
        ),
        (json.dumps({"format": "something else", "version": 1}), "not of a block store"),
        ("no JSON", "not of a block store"),
    ],
)
def test_another_format_is_refused_with_what_to_do(store, content, message):
    store.close()
    (store.directory / "format.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        DiskStore(store.directory)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "blocks").write_text("")
    with pytest.raises(StoreError, match="choose a directory"):
        DiskStore(tmp_path / "blocks")


def test_a_first_opening_that_was_killed_is_finished_by_the_next(tmp_path):
    (tmp_path / "format.json.tmp").write_text("{")
    with DiskStore(tmp_path) as store:
        store["a"] = make_block("a")
        assert "a" in store


def test_a_damaged_index_is_refused_with_what_to_do(store):
    store["a"] = make_block("a")
    store.close()
    (store.directory / "cache.db").write_bytes(
        b"no database at all, but long enough to be taken for one" * 100
    )
    for suffix in ("-wal", "-shm"):
        Path(f"{store.directory}/cache.db{suffix}").unlink(missing_ok=True)
    with pytest.raises(StoreError, match="delete it and prefill again"):
        DiskStore(store.directory)


# Budget


def test_the_budget_holds_and_the_least_used_goes_first(tmp_path):
    with DiskStore(tmp_path, size_limit_bytes=3 * FILE_BYTES) as store:
        for name in "abc":
            store[name] = make_block(name)
        store.get_many("ac")
        store["d"] = make_block("d")
        assert set(store) == {"a", "c", "d"}
        assert store.size_bytes == sum(path.stat().st_size for path in files_of(tmp_path)) == 3 * FILE_BYTES
        assert store.stats().num_evictions == 1


def test_the_cheapest_goes_first(tmp_path):
    with DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES) as store:
        store.put("dear", make_block("dear"), cost_seconds=2.0)
        store.put("cheap", make_block("cheap"), cost_seconds=0.1)
        store.put("new", make_block("new"), cost_seconds=1.0)
        assert set(store) == {"dear", "new"}


def test_uses_are_counted_from_the_storing_of_a_block_over_all_openings(store):
    for block_id in ("idle", "used", "gone"):
        store[block_id] = make_block(block_id)
    assert store.use_counts() == {"idle": 0, "used": 0, "gone": 0}
    store.get_many(["used", "gone"])
    again = reopened(store)  # which flushes
    assert again["used"].num_tokens
    again.count_uses(["used"])  # what memory served
    del again["gone"]
    assert again.use_counts() == {"idle": 0, "used": 3}  # before they are flushed, too
    assert again.use_counts(["used", "absent"]) == {"used": 3}
    assert again.use_counts(iter(["idle"])) == {"idle": 0}
    assert again.use_counts([]) == {}


def test_what_was_popular_once_sinks_below_what_is_in_use(tmp_path):
    with DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES) as store:
        store["old"] = make_block("old")
        for _ in range(5):
            store["old"]
        for index in range(20):
            store[f"new {index}"] = make_block(f"new {index}")
        assert "old" not in store


def test_pinned_blocks_stay_even_when_pinned_before_they_arrive(tmp_path):
    store = DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES)
    store.pin(["a"])
    for name in "abcdef":
        store[name] = make_block(name)
    assert set(store) == {"a", "f"}
    store = reopened(store, size_limit_bytes=2 * FILE_BYTES)
    store["g"] = make_block("g")
    assert set(store) == {"a", "g"}
    assert store.stats().num_pinned == 1
    store.unpin(["a"])
    store["h"] = make_block("h")
    assert set(store) == {"g", "h"}
    store.close()


def test_a_block_that_can_never_fit_is_not_stored_and_evicts_nothing(tmp_path, caplog):
    with DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES) as store:
        store.put_many({name: make_block(name) for name in "ab"})
        assert not store.put("huge", make_block("huge", 1000))
        assert "1 of 1 blocks, huge first, were not stored" in caplog.text
        store.pin("ab")
        assert not store.put("c", make_block("c"))
        assert set(store) == {"a", "b"}


def test_a_batch_larger_than_the_budget_is_cut_up(tmp_path, monkeypatch):
    most = []
    original = disk_module.write_block

    def measured(path, block_id, states):
        original(path, block_id, states)
        most.append(sum(file.stat().st_size for file in files_of(tmp_path)))

    monkeypatch.setattr(disk_module, "write_block", measured)
    with DiskStore(tmp_path, size_limit_bytes=4 * FILE_BYTES) as store:
        store.put_many({str(i): make_block(str(i)) for i in range(10)})
        assert set(store) == {"6", "7", "8", "9"}
    assert max(most) <= 4 * FILE_BYTES


def test_blocks_of_one_batch_that_are_pinned_do_not_exceed_the_budget(tmp_path):
    with DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES) as store:
        store.pin("abc")
        assert store.put_many({name: make_block(name) for name in "abc"}) == ["a", "b"]
        assert store.size_bytes == 2 * FILE_BYTES


def test_a_negative_budget_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="size_limit_bytes is -1"):
        DiskStore(tmp_path, size_limit_bytes=-1)
    assert list(tmp_path.iterdir()) == []


def test_uses_are_remembered_after_reopening(tmp_path):
    store = DiskStore(tmp_path, size_limit_bytes=2 * FILE_BYTES)
    store.put_many({name: make_block(name) for name in "ab"})
    store.get_many("aaa")
    store["a"]
    store = reopened(store, size_limit_bytes=2 * FILE_BYTES)
    store["c"] = make_block("c")
    assert set(store) == {"a", "c"}
    store.close()


def test_reading_takes_no_lock_and_does_not_wait_for_a_writer(store):
    store.put_many({name: make_block(name) for name in "ab"})
    log = store.directory / "cache.db-wal"
    before = log.read_bytes()
    writer = sqlite3.connect(store.directory / "cache.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert store.get_many("ab").keys() == {"a", "b"}
    assert is_same(store["a"], make_block("a"))
    assert list(store) == ["a", "b"]
    assert store.stats().num_hits == 3
    assert time.monotonic() - started < 5  # a lock would be waited for a minute
    writer.execute("ROLLBACK")
    writer.close()
    assert log.read_bytes() == before


# Many blocks, read for the first time


@pytest.fixture
def many(store, monkeypatch):
    """A store with nine blocks that were not read yet, on a machine of four cores."""
    monkeypatch.setattr(workers, "num_cores", lambda: 4)
    store.put_many({name: make_block(name) for name in "abcdefghi"})
    with reopened(store) as fresh:
        yield fresh


@pytest.mark.parametrize("read", [DiskStore.get_many, DiskStore.preload])
def test_blocks_are_checked_side_by_side_and_come_in_the_order_asked_for(many, monkeypatch, read):
    both, original = threading.Barrier(2), disk_module.read_block

    def meet(*args, **options):
        both.wait(10)
        return original(*args, **options)

    monkeypatch.setattr(disk_module, "read_block", meet)
    found = read(many, "hcafbdge")
    assert list(found) == list("hcafbdge")
    assert all(is_same(found[name], make_block(name)) for name in found)


def test_blocks_that_were_checked_are_mapped_by_the_thread_that_asks(many, monkeypatch):
    many.get_many("abcdefgh")
    threads, original = set(), disk_module.read_block

    def note(*args, **options):
        threads.add((threading.get_ident(), options["check"]))
        return original(*args, **options)

    monkeypatch.setattr(disk_module, "read_block", note)
    assert list(many.get_many("abcdefghi")) == list("abcdefghi")
    assert threads == {(threading.get_ident(), False), (threading.get_ident(), True)}  # one is new


def test_among_many_what_is_damaged_is_dropped_and_what_is_gone_is_missed(many, caplog):
    truncate(file_of(many, "b"))
    flip_a_bit(file_of(many, "e"))
    file_of(many, "g").unlink()
    assert list(many.get_many("abcdxefgh")) == list("acdfh")
    assert [record.args[0] for record in caplog.records] == ["b", "e"]
    assert (many.stats().num_hits, many.stats().num_misses) == (5, 4)
    assert many.use_counts("ab") == {"a": 1}
    assert "e" not in many
    many.put_many({name: make_block(name) for name in "beg"})
    assert list(many.get_many("abcdefgh")) == list("abcdefgh")


def test_among_many_another_failure_of_the_disk_is_reported(many, monkeypatch):
    original = disk_module.read_block

    def fail_at_d(path, block_id, *, check):
        if block_id == "d":
            raise OSError(errno.EIO, "Input/output error")
        return original(path, block_id, check=check)

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "read_block", fail_at_d)
        with pytest.raises(StoreError, match="Input/output error"):
            many.get_many("abcdefgh")
    assert list(many.get_many("abcdefgh")) == list("abcdefgh")


# A full disk


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def check_nothing_happened(store: DiskStore) -> None:
    assert set(store) == {"a"}
    assert files_of(store.directory) == [file_of(store, "a")]
    assert store.size_bytes == FILE_BYTES
    store.put_many({name: make_block(name) for name in "bc"})
    assert all(is_same(store[name], make_block(name)) for name in "abc")


def test_a_full_disk_is_reported_and_nothing_half_written_stays(store, monkeypatch):
    store["a"] = make_block("a")
    original = disk_module.write_block
    with monkeypatch.context() as patch:

        def fill_up(path, block_id, states):
            original(path, block_id, states)
            if block_id == "c":
                os.truncate(path, 5000)
                full_disk()

        patch.setattr(disk_module, "write_block", fill_up)
        with pytest.raises(OutOfSpaceError, match="free some space"):
            store.put_many({name: make_block(name) for name in "bc"})
    check_nothing_happened(store)


def test_a_limit_on_file_sizes_counts_as_a_full_disk(store):
    store["a"] = make_block("a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OutOfSpaceError):
            store.put_many({"b": make_block("b"), "c": make_block("c", 10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_nothing_happened(store)


def test_an_index_that_cannot_grow_counts_as_a_full_disk(store):
    store["a"] = make_block("a")
    ((num_pages,),) = store._index._sql("PRAGMA page_count").fetchall()
    store._index._sql(f"PRAGMA max_page_count = {num_pages}")
    with pytest.raises(OutOfSpaceError):
        store.put_many({f"{i} {'x' * 900}": make_block(str(i)) for i in range(60)})
    store._index._sql("PRAGMA max_page_count = 1000000")
    check_nothing_happened(store)


def test_a_damaged_block_is_reported_as_such_even_if_it_cannot_be_dropped(store, monkeypatch, caplog):
    store["a"] = make_block("a")
    truncate(file_of(store, "a"))
    with monkeypatch.context() as patch:
        patch.setattr(store._index, "transact", full_disk)
        with pytest.raises(CorruptBlockError, match="block a"):
            store["a"]
    assert "could not be dropped" in caplog.text
    assert "a" in store


def test_another_failure_of_the_disk_is_reported_and_leaves_nothing(store, monkeypatch):
    store["a"] = make_block("a")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "write_block", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            store["b"] = make_block("b")
    check_nothing_happened(store)


# Several at once

WRITERS_TO_KILL = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
from rag_blockcache.store import DiskStore
from store_blocks import make_block

order = random.Random(int(sys.argv[3]))
log = os.open(sys.argv[2] + ".log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
for generation in range(12):
    child = os.fork()
    if not child:
        store = DiskStore(sys.argv[2])
        for step in range(10_000):
            names = [f"{generation}-{step}-{i}" for i in range(3)]
            store.put_many((name, make_block(name, 200)) for name in names)
            os.write(log, "".join(f"{name}\\n" for name in names).encode())
            if step % 3 == 2:
                del store[names[0]]
                os.write(log, f"-{names[0]}\\n".encode())
    time.sleep(order.uniform(0.01, 0.4))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def run_script(script: str, *args: object) -> None:
    """Run a script that forks, in a process of its own where nothing else is going on."""
    command = [sys.executable, "-c", script, str(Path(__file__).parent), *map(str, args)]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_writers_can_be_killed_at_any_moment(tmp_path):
    directory, seed = tmp_path / "blocks", random.randrange(10_000)
    run_script(WRITERS_TO_KILL, directory, seed)
    lines = Path(f"{directory}.log").read_text().split("\n")[:-1]
    deleted = {line[1:] for line in lines if line.startswith("-")}
    committed = {line for line in lines if not line.startswith("-")} - deleted
    with DiskStore(directory) as store:
        held = set(store)
        assert len(held) > 10, seed
        # the last thing each of the 12 did may have been committed and not logged: three blocks or a deletion
        assert len(held - committed) <= 12 * 3, seed
        assert len(committed - held) <= 12, seed
        assert all(name.endswith("-0") for name in committed - held), seed
        assert not held & deleted, seed
        assert all(is_same(store[name], make_block(name, 200)) for name in held), seed
        check_accounts(store)


def check_accounts(store: DiskStore) -> None:
    """Check that files, entries and sizes agree."""
    sizes = [path.stat().st_size for path in files_of(store.directory)]
    assert (len(store), store.size_bytes) == (len(sizes), sum(sizes))
    ((num_blocks, num_bytes),) = store._index._rows("SELECT COUNT(*), TOTAL(num_bytes) FROM Usage")
    assert (num_blocks, num_bytes) == (len(sizes), sum(sizes))


def share_directory(directory: str, seed: int, limit: int | None, seconds: float) -> None:
    """Read, write, delete and evict at random until the time is up; fail on any wrong block."""
    order = random.Random(seed)
    with DiskStore(directory, size_limit_bytes=limit) as store:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            names = [f"block {order.randrange(30)}" for _ in range(3)]
            action = order.random()
            if action < 0.6:
                for name, states in store.get_many(names).items():
                    assert is_same(states, make_block(name, 50)), name
            elif action < 0.9:
                store.put_many((name, make_block(name, 50)) for name in names)
            elif action < 0.97:
                with suppress(KeyError):
                    del store[names[0]]
            else:
                store.repair()


SHARERS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_disk_store import share_directory

limits = [int(sys.argv[3]), int(sys.argv[3]), int(sys.argv[3]), None]
for seed, limit in enumerate(limits):
    if not os.fork():
        share_directory(sys.argv[2], seed, limit, seconds=2.0)
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in limits))
"""


def test_processes_may_share_a_directory(tmp_path):
    limit = 12 * stored_bytes(make_block("block 0", 50))
    run_script(SHARERS, tmp_path / "blocks", limit)
    with DiskStore(tmp_path / "blocks", size_limit_bytes=limit) as store:
        assert len(store) > 3
        assert all(is_same(store[name], make_block(name, 50)) for name in store)
        check_accounts(store)
        store["one more"] = make_block("one more", 50)
        assert store.size_bytes <= limit


def test_threads_may_share_a_store(tmp_path):
    limit = 12 * stored_bytes(make_block("block 0", 50))
    failures = []

    def work(seed: int) -> None:
        order = random.Random(seed)
        try:
            for _ in range(60):
                name = f"block {order.randrange(30)}"
                states = store.get(name)
                if states is None:
                    store[name] = make_block(name, 50)
                else:
                    assert is_same(states, make_block(name, 50))
        except (AssertionError, StoreError) as error:
            failures.append(error)
        finally:
            store.close()  # the connection of this thread

    with DiskStore(tmp_path, size_limit_bytes=limit) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert store.size_bytes == sum(path.stat().st_size for path in files_of(tmp_path)) <= limit


# Any sequence of operations

NAMES = st.sampled_from("abcdefgh")


class DiskStoreMachine(RuleBasedStateMachine):
    """Without a budget the store is a dict; with one, part of a dict, and never over the budget."""

    @initialize(limit=st.sampled_from([None, 0, FILE_BYTES, 4 * FILE_BYTES + 7]))
    def open_store(self, limit):
        self.directory = tempfile.mkdtemp()
        self.limit = limit
        self.model: dict[str, KVStates] = {}
        self.pinned: set[str] = set()
        self.store = DiskStore(self.directory, size_limit_bytes=limit)

    @rule(name=NAMES, cost=st.floats(0, 10))
    def put(self, name, cost):
        present = self.pinned & set(self.store)
        kept = self.store.put(name, self._block(name), cost_seconds=cost)
        assert kept == (name in self.store)
        assert present <= set(self.store)
        self.model[name] = self._block(name)

    @rule(names=st.lists(NAMES, max_size=6))
    def put_many(self, names):
        self.store.put_many((name, self._block(name)) for name in names)
        self.model.update((name, self._block(name)) for name in names)

    @rule(name=NAMES)
    def get(self, name):
        states = self.store.get(name)
        assert states is None or is_same(states, self.model[name])
        assert self.limit is not None or (states is None) == (name not in self.model)

    @rule(names=st.lists(NAMES))
    def get_many(self, names):
        assert self.store.get_many(names).keys() == set(names) & set(self.store)

    @rule(name=NAMES)
    def delete(self, name):
        if name in self.store:
            del self.store[name]
        else:
            with pytest.raises(KeyError):
                del self.store[name]
        self.model.pop(name, None)

    @rule(names=st.sets(NAMES, max_size=2))
    def pin(self, names):
        self.store.pin(names)
        self.pinned |= names

    @rule(names=st.sets(NAMES))
    def unpin(self, names):
        self.store.unpin(names)
        self.pinned -= names

    @rule()
    def reopen(self):
        self.store = reopened(self.store, size_limit_bytes=self.limit)

    @precondition(lambda self: self.model)
    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()

    @invariant()
    def holds_what_it_should(self):
        held = set(self.store)
        assert held <= self.model.keys()
        assert len(self.store) == len(held)
        if self.limit is None:
            assert held == self.model.keys()
        else:
            assert self.store.size_bytes <= self.limit
        paths = files_of(Path(self.directory))
        assert sum(path.stat().st_size for path in paths) == self.store.size_bytes

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)

    @staticmethod
    def _block(name: str) -> KVStates:
        return make_block(name, 1 + 3 * (ord(name) - ord("a")))


DiskStoreMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
test_any_sequence_of_operations = DiskStoreMachine.TestCase


def test_a_budget_is_on_record_for_whoever_opens_the_directory_next(tmp_path):
    with DiskStore(tmp_path, size_limit_bytes=50_000) as store:
        assert store.size_limit_bytes == 50_000
    with DiskStore(tmp_path) as store:
        assert store.size_limit_bytes == 50_000
        for index in range(40):
            store.put(f"block-{index}", make_block(f"block-{index}"))
        assert store.size_bytes <= 50_000
    with DiskStore(tmp_path, size_limit_bytes=80_000) as store:
        assert store.size_limit_bytes == 80_000

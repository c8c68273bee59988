"""Blocks are in memory when a prompt asks for them, because a retriever named their passages before."""

from __future__ import annotations

import logging
import threading

import pytest

from rag_blockcache import BlockCache, Passage, PrefilledIndex, prefetcher
from rag_blockcache.evaluation import page_cache
from rag_blockcache.shared_cache import SharedCache
from rag_blockcache.store import disk

PASSAGES = [Passage(f"The mill number {number} has {number} columns of oak.") for number in range(6)]


@pytest.fixture
def directory(tiny_model, tiny_tokenizer, tmp_path):
    """A directory with the blocks of all passages but the last."""
    with BlockCache(tiny_model, tmp_path, tokenizer=tiny_tokenizer) as cache:
        cache.prefill(PASSAGES[:-1])
    return tmp_path


@pytest.fixture
def cache(tiny_model, tiny_tokenizer, directory):
    with BlockCache(tiny_model, directory, tokenizer=tiny_tokenizer) as cache:
        yield cache


def names_of(cache, passages):
    return [cache.block(passage).block_id for passage in passages]


def test_stored_blocks_are_brought_into_memory_and_no_use_is_counted(cache):
    assert cache.prefetch(PASSAGES).result() == len(PASSAGES) - 1  # the last is not stored, and not encoded
    memory, below = cache.store.memory, cache.store.disk
    assert all(name in memory for name in names_of(cache, PASSAGES[:-1]))
    assert names_of(cache, PASSAGES[-1:])[0] not in cache.store
    before = below.stats()
    assert before.num_hits == 0
    assert set(below.use_counts().values()) == {0}
    answer = cache.generate("Which mill?", PASSAGES[:-1], policy="block", max_new_tokens=2)
    assert answer.num_hits == len(PASSAGES) - 1
    assert below.stats().num_hits == before.num_hits  # memory had them
    assert cache.prefetch(PASSAGES).result() == 0  # there is nothing left to bring


def test_answers_are_those_of_a_cache_that_read_nothing_ahead(cache, tiny_model, tiny_tokenizer, directory):
    with BlockCache(tiny_model, directory, tokenizer=tiny_tokenizer) as other:
        expected = other.generate("Which mill?", PASSAGES, policy="block", max_new_tokens=8, do_sample=False)
    cache.prefetch(PASSAGES)
    found = cache.generate("Which mill?", PASSAGES, policy="block", max_new_tokens=8, do_sample=False)
    assert found.token_ids == expected.token_ids


def test_all_files_are_requested_those_that_were_checked_before_too(cache, directory, monkeypatch):
    cache.prefetch(PASSAGES).result()
    cache.store.memory.clear()  # what stays is that the files were checked, and need not be read for that
    requested = []
    monkeypatch.setattr(disk, "request_file", requested.append)
    assert cache.prefetch(PASSAGES).result() == len(PASSAGES) - 1
    assert sorted(requested) == page_cache.block_files(directory / "blocks")


def test_a_damaged_block_is_dropped_and_the_others_come(cache, directory, caplog):
    damaged = page_cache.block_files(directory / "blocks")[0]
    content = bytearray(damaged.read_bytes())
    content[-8:] = b"\xff" * 8
    damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING, "rag_blockcache"):
        assert cache.prefetch(PASSAGES[:-1]).result() == len(PASSAGES) - 2
    assert "is dropped" in caplog.text


def test_what_fails_in_the_background_is_logged(cache, monkeypatch, caplog):
    def fail(block_ids):
        raise OSError("the disk has gone")

    monkeypatch.setattr(cache.store, "prefetch", fail)
    with caplog.at_level(logging.WARNING, "rag_blockcache"):
        assert isinstance(cache.prefetch(PASSAGES).exception(), OSError)
        cache.close()  # waits for the thread, callbacks included
    assert "not read ahead: the disk has gone" in caplog.text


def test_closing_waits_for_what_has_begun_and_drops_what_has_not(cache, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    def slow(block_ids):
        begun.set()
        assert may_end.wait(10)
        return []

    monkeypatch.setattr(cache.store, "prefetch", slow)
    first, second = cache.prefetch(PASSAGES), cache.prefetch(PASSAGES)
    assert begun.wait(10)
    threading.Timer(0.1, may_end.set).start()
    cache.close()
    assert first.result() == 0
    assert second.cancelled()
    monkeypatch.undo()
    assert cache.prefetch(PASSAGES).result() > 0  # a cache that was closed may be used again


def test_calls_that_would_come_too_late_are_not_queued(cache, monkeypatch):
    may_end = threading.Event()
    monkeypatch.setattr(cache.store, "prefetch", lambda block_ids: may_end.wait(10) and [])
    monkeypatch.setattr(prefetcher, "_MOST_WAITING", 2)
    waiting = [cache.prefetch(PASSAGES) for _ in range(2)]
    assert cache.prefetch(PASSAGES).result(0) == 0  # at once
    may_end.set()
    assert [each.result(10) for each in waiting] == [0, 0]
    cache.close()
    monkeypatch.undo()
    assert cache.prefetch(PASSAGES).result() > 0  # there is room again


def test_a_cache_without_a_disk_has_nothing_to_bring(tiny_model, tiny_tokenizer):
    with BlockCache(tiny_model, None, tokenizer=tiny_tokenizer) as cache:
        assert cache.prefetch(PASSAGES).result() == 0


@pytest.mark.parametrize("is_handle", [False, True])
def test_a_search_reads_what_it_finds_ahead(is_handle, tiny_model, tiny_tokenizer, tmp_path):
    options = {"tokenizer": tiny_tokenizer, "passage_format": "verbatim"}
    with BlockCache(tiny_model, tmp_path, **options) as cache, PrefilledIndex(tmp_path, cache=cache) as index:
        index.add(PASSAGES[:3], embeddings=[[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    cache = (
        SharedCache(tiny_model, tmp_path, **options)
        if is_handle
        else BlockCache(tiny_model, tmp_path, **options)
    )
    with PrefilledIndex(tmp_path, cache=cache) as index:
        index.search([1, 0.1, 0], k=2)
        if is_handle:
            assert not cache.is_loaded  # a search alone loads no model
            cache.get()
            index.search([1, 0.1, 0], k=2)
        opened = cache.get() if is_handle else cache
        opened.prefetch(PASSAGES[3:]).result()  # behind what the search asked for
        memory = opened.store.memory
        held = [name in memory for name in names_of(opened, PASSAGES[:3])]
        assert held == [True, True, False]
    cache.close()

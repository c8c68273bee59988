"""A prefill keeps to the disk budget, encodes nothing for the bin, and says what it left out."""

from __future__ import annotations

from rag_blockcache import BlockCache


def limited(tiny_cache, tmp_path, num_blocks):
    """A cache with a disk budget for so many blocks of 100 tokens."""
    num_bytes = num_blocks * (4096 + 100 * tiny_cache.model.kv_bytes_per_token)
    return BlockCache(
        tiny_cache.model.network,
        tmp_path / "limited",
        tokenizer=tiny_cache.tokenizer,
        disk_budget_bytes=num_bytes,
    )


def of_100_tokens(cache, number):
    rest = 100 - len(cache.block(f"{number:2}").token_ids)
    passage = f"{number:2}{'x' * rest}"
    assert len(cache.block(passage).token_ids) == 100
    return passage


def test_what_the_disk_budget_has_no_room_for_is_not_encoded_and_reported(tiny_cache, tmp_path):
    with limited(tiny_cache, tmp_path, num_blocks=3) as cache:
        passages = [of_100_tokens(cache, number) for number in range(8)]
        report = cache.prefill(passages[:5])
        assert (report.num_passages, report.num_encoded, report.num_not_stored) == (5, 3, 2)
        assert report.num_tokens == 300
        assert cache.store.disk.stats().num_evictions == 0
        kept = cache.prefill(passages[4:], evict=False)
        assert (kept.num_encoded, kept.num_not_stored, kept.num_tokens) == (0, 4, 0)
        newer = cache.prefill(passages[5:])  # evicts what was there before
        assert (newer.num_encoded, newer.num_skipped, newer.num_not_stored) == (3, 0, 0)
        again = cache.prefill(passages[5:])
        assert (again.num_encoded, again.num_skipped) == (0, 3)


def test_blocks_that_were_evicted_in_the_same_call_are_not_reported_as_stored(
    tiny_cache, tmp_path, monkeypatch
):
    def one_by_one(*arguments):
        for batch, seconds in encode(*arguments):
            yield from (({name: states}, seconds / len(batch)) for name, states in batch.items())

    with limited(tiny_cache, tmp_path, num_blocks=3) as cache:
        encode = cache._blocks.encode
        monkeypatch.setattr(cache._blocks, "encode", one_by_one)
        passages = [of_100_tokens(cache, number) for number in range(5)]
        cache.prefill(passages[:2])
        cache.store.disk.count_uses([cache.block(passage).block_id for passage in passages[:2]] * 10_000)
        report = cache.prefill(passages[2:])  # the two are worth more than what is new
        assert (report.num_encoded, report.num_not_stored) == (1, 2)
        assert sum(cache.block(passage).block_id in cache.store.disk for passage in passages[2:]) == 1

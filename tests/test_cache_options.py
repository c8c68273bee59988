"""The adapters' fields are the options of a BlockCache, all of them."""

from __future__ import annotations

import inspect

import pytest

pytest.importorskip("pydantic")

from rag_blockcache.integrations.cache_options import CacheOptions

from rag_blockcache import BlockCache


def test_adapters_take_every_option_of_a_block_cache_with_its_default():
    parameters = inspect.signature(BlockCache).parameters.values()
    options = {each.name: each.default for each in parameters if each.name not in ("model", "directory")}
    fields = {name: field.default for name, field in CacheOptions.model_fields.items()}
    assert fields == {**options, "cache_dir": None, "passage_format": "verbatim", "admission": "frequency"}


def test_fields_reach_the_engine_and_what_a_call_gives_goes_before_them(tiny_model, tiny_tokenizer, tmp_path):
    options = CacheOptions(
        cache_dir=tmp_path / "kv", tokenizer=tiny_tokenizer, disk_budget_bytes=10**6, salt="a", guard_rate=0.5
    )
    handle = options.shared_cache(tiny_model, salt="b")
    cache = handle.get()
    assert cache.store.disk.directory == tmp_path / "kv" / "blocks"
    assert cache.store.disk.size_limit_bytes == 10**6
    assert (cache.prompt.format.name, cache.guard.rate) == ("verbatim", 0.5)
    same, other = options.shared_cache(tiny_model, salt="b"), options.shared_cache(tiny_model)
    assert same.get() is cache
    assert other.get() is not cache
    for each in (handle, other):
        each.close()

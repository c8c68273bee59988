"""Two blocks have one name only if their KV states are the same, and a name stays what it is."""

from __future__ import annotations

from itertools import combinations

from rag_blockcache import BlockCache, model
from rag_blockcache.passages import block_id

NAMED_BY_VERSION = {2: "d845f6def3dd496c34d59cb5823e9b94"}


def test_a_name_changes_only_with_the_format_version():
    named = block_id([1, 2, 70_000], fingerprint="f", conditioned_on=[5])
    assert named == NAMED_BY_VERSION[model.FORMAT_VERSION], (
        "blocks of the old names are not found any more: raise FORMAT_VERSION, so that an index made with "
        "them is refused instead of missed block by block, and say so in the changelog"
    )


def test_everything_that_states_depend_on_is_in_the_name():
    names = [
        block_id([1, 2, 3], fingerprint="f"),
        block_id([1, 2, 3], fingerprint="g"),
        block_id([1, 2], fingerprint="f", conditioned_on=[3]),
        block_id([3], fingerprint="f", conditioned_on=[1, 2]),
        block_id([1, 2], fingerprint="f"),
        block_id([1, 2, 3, 0], fingerprint="f"),
        block_id([1, 2, 3 + 2**32], fingerprint="f"),
        block_id([], fingerprint="f"),
    ]
    assert all(one != other for one, other in combinations(names, 2))


def test_another_format_version_is_another_fingerprint(tiny_model_path, tmp_path, monkeypatch):
    with BlockCache(tiny_model_path, tmp_path / "one") as cache:
        before = cache.fingerprint
    monkeypatch.setattr(model, "FORMAT_VERSION", model.FORMAT_VERSION + 1)
    with BlockCache(tiny_model_path, tmp_path / "other") as cache:
        assert cache.fingerprint != before

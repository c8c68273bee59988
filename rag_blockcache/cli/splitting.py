"""The splitter that ``index-and-prefill`` and ``estimate`` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.jobs.documents import PassageSplitter


def splitter_for(cache: BlockCache, max_tokens: int | None, overlap: int | None) -> PassageSplitter:
    """Cut documents by the tokens of the model; options left out are the splitter's own."""
    from rag_blockcache.jobs.documents import PassageSplitter

    given = {"max_tokens": max_tokens, "overlap": overlap}
    return PassageSplitter(
        cache.tokenizer, **{name: value for name, value in given.items() if value is not None}
    )

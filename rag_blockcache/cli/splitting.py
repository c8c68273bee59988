"""The splitter that ``index-and-prefill`` and ``estimate`` have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rag_blockcache.block_cache import BlockCache
    from rag_blockcache.jobs.documents import PassageSplitter

DEFAULT_MAX_TOKENS = 256  # what common embedders read of a passage
DEFAULT_OVERLAP = 0


def splitter_for(
    cache: BlockCache, max_tokens: int | None, overlap: int | None, *, recorded: str = ""
) -> PassageSplitter:
    """Cut documents by the tokens of the model.

    Args:
        cache: Has the tokenizer.
        max_tokens: Longest passage; None takes what is on record, else the default.
        overlap: Tokens that a passage repeats; None likewise.
        recorded: The splitter of an index, in its own words: both numbers in this order.
    """
    from rag_blockcache.jobs.documents import PassageSplitter

    known = [int(number) for number in re.findall(r"\d+", recorded)]
    defaults = known if len(known) == 2 else [DEFAULT_MAX_TOKENS, DEFAULT_OVERLAP]
    return PassageSplitter(
        cache.tokenizer,
        max_tokens=defaults[0] if max_tokens is None else max_tokens,
        overlap_tokens=defaults[1] if overlap is None else overlap,
    )

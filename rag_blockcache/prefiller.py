"""Passages in, stored blocks out: what `BlockCache.prefill` and the job do before any question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from rag_blockcache.answers import PrefillProgress, PrefillReport, PrefillTally
from rag_blockcache.block_source import BlockSource
from rag_blockcache.errors import ContextTooLongError
from rag_blockcache.passages import Block, Passage
from rag_blockcache.planner import Planner

_GROUP = 1024  # passages whose tokens are looked at together, so that rows of a batch are alike in length


def prefill_passages(
    planner: Planner,
    blocks: BlockSource,
    passages: Iterable[Passage],
    *,
    num_total: int | None,
    progress: Callable[[PrefillProgress], None] | None,
    evict: bool,
) -> PrefillReport:
    """Encode and store the blocks of passages that are not stored; see ``BlockCache.prefill``."""
    store = blocks.store
    tally = PrefillTally(num_total, progress)
    remaining, room = iter(passages), store.room(evicting=evict)
    stored: list[str] = []
    while group := list(islice(remaining, _GROUP)):
        missing = _missing(planner, blocks, group, tally.num_done)
        tally.skip(len(group) - len(missing))
        fitting = [block for block in missing if room.take(blocks.num_bytes(len(block.token_ids)))]
        tally.leave_out(len(missing) - len(fitting))
        for batch, seconds in blocks.encode(fitting, planner.usual_preamble()):
            kept = store.put_many(batch, cost_seconds=seconds)
            tally.add(batch[block_id] for block_id in kept)
            tally.leave_out(len(batch) - len(kept))
            stored += kept if room.is_limited else []
    tally.lose(sum(not store.keeps(block_id) for block_id in stored))
    return tally.report()


def _missing(planner: Planner, blocks: BlockSource, group: Sequence[Passage], num_before: int) -> list[Block]:
    """Return the blocks of a group that are not stored, each once."""
    missing: dict[str, Block] = {}
    for index, block in enumerate(planner.blocks(group)):
        if len(block.token_ids) > blocks.model.max_length:
            raise ContextTooLongError(
                f"passage {num_before + index} has {len(block.token_ids)} tokens, the context window of "
                f"the model is {blocks.model.max_length}; split it into shorter passages"
            )
        if block.block_id not in missing and not blocks.store.keeps(block.block_id):
            missing[block.block_id] = block
    return list(missing.values())

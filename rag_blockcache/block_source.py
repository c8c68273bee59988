"""Blocks by name: from the store where they are, encoded now and stored where they are not."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import OutOfSpaceError
from rag_blockcache.kv_states import KVStates
from rag_blockcache.model import Model
from rag_blockcache.passages import Block, block_id
from rag_blockcache.plan import Plan
from rag_blockcache.store import TieredStore

logger = logging.getLogger(__name__)


class BlockSource:
    """Gives the KV states of blocks, and names them.

    Args:
        model: Encodes what is missing.
        store: Keeps what was encoded.
        fingerprint: All that states depend on beside tokens.
        condition_on_preamble: Whether blocks also attend to the preamble of their prompt.
    """

    def __init__(
        self, model: Model, store: TieredStore, *, fingerprint: str, condition_on_preamble: bool = False
    ) -> None:
        self.model, self.store = model, store
        self.fingerprint = fingerprint
        self.condition_on_preamble = condition_on_preamble

    def block(self, token_ids: Sequence[int], *, preamble: Sequence[int] = (), regime: str = "") -> Block:
        """Name a block of these tokens in a prompt with this preamble."""
        seen = preamble if self.condition_on_preamble else ()
        named = f"{self.fingerprint}/{regime}"
        return Block(tuple(token_ids), block_id(token_ids, fingerprint=named, conditioned_on=seen))

    def load(self, plan: Plan) -> dict[str, KVStates]:
        """Return the states of those blocks of a plan that are stored, and note them in the plan."""
        start = time.perf_counter()
        states = self.store.get_many(list({block.block_id for block in plan.blocks.values()}))
        plan.found = frozenset(states)
        plan.load_seconds = time.perf_counter() - start
        return states

    def encode_missing(self, plan: Plan) -> dict[str, KVStates]:
        """Encode and store those blocks of a plan that were not found; return their states."""
        start = time.perf_counter()
        missing = {b.block_id: b for b in plan.blocks.values() if b.block_id not in plan.found}
        preamble = plan.segments[0].token_ids
        encoded: dict[str, KVStates] = {}
        first = plan.blocks.get(0)
        if first is not None and missing.pop(first.block_id, None) is not None:
            encoded[first.block_id] = self._preamble(preamble, plan.regime, keep=plan.keeps_preamble)
        for batch, seconds in self.encode(list(missing.values()), preamble, plan.regime):
            encoded |= batch
            self._keep(batch, seconds)
        plan.encode_seconds = time.perf_counter() - start
        return encoded

    def encode(
        self, blocks: Sequence[Block], preamble: Sequence[int] = (), regime: str = ""
    ) -> Iterator[tuple[dict[str, KVStates], float]]:
        """Yield the states of blocks a batch at a time, with the seconds that each batch took."""
        before = None
        if self.condition_on_preamble and preamble and blocks:
            before = self._preamble(preamble, regime)
        start = time.perf_counter()
        token_ids = [block.token_ids for block in blocks]
        for batch in encode_blocks(self.model, token_ids, conditioned_on=before, regime=regime):
            states = {blocks[index].block_id: states for index, states in batch}
            yield states, time.perf_counter() - start
            start = time.perf_counter()

    def _preamble(self, preamble: Sequence[int], regime: str, *, keep: bool = True) -> KVStates:
        name = self.block(preamble, regime=regime).block_id
        states = self.store.get(name)
        if states is None:
            start = time.perf_counter()
            [[(_, states)]] = encode_blocks(self.model, [preamble], regime=regime)
            if keep:
                self._keep({name: states}, time.perf_counter() - start)
        return states

    def _keep(self, states: Mapping[str, KVStates], seconds: float) -> None:
        """Store blocks that an answer needed; a full disk must not cost the answer."""
        try:
            self.store.put_many(states, cost_seconds=seconds)
        except OutOfSpaceError as error:
            logger.warning("answering goes on, but %d blocks were not stored: %s", len(states), error)

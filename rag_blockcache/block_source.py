"""Blocks by name: from the store where they are, encoded now and stored where they are not."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Literal, get_args

from rag_blockcache.conditioning import BlocksSee
from rag_blockcache.encoder import encode_blocks
from rag_blockcache.errors import InvalidInputError, OutOfSpaceError
from rag_blockcache.kv_states import BlockStates, KVStates
from rag_blockcache.model import Model
from rag_blockcache.passages import Block, block_id
from rag_blockcache.plan import Plan
from rag_blockcache.store import TieredStore

logger = logging.getLogger(__name__)

Admission = Literal["always", "frequency", "off"]

_MAX_ON_PROBATION = 100_000  # names


class BlockSource:
    """Gives the KV states of blocks, and names them.

    Args:
        model: Encodes what is missing.
        store: Keeps what was encoded.
        fingerprint: All that states depend on beside tokens.
        blocks_see: What blocks attend to beside themselves; see ``conditioning``.
        stand_ins: Tokens of the stand-ins for other passages; used if ``blocks_see`` says so.
        admission: What becomes of blocks that an answer needed and nobody had prefilled: ``always`` stores
            them, ``frequency`` keeps them in memory and stores them at their second use, ``off`` drops them.
        codec: Form in which blocks are kept, and used: what was just encoded is no nearer to the model than
            what was stored before, so that an answer does not depend on it.

    Raises:
        InvalidInputError: If there is no such admission.
    """

    def __init__(
        self,
        model: Model,
        store: TieredStore,
        *,
        fingerprint: str,
        blocks_see: BlocksSee = "themselves",
        stand_ins: Sequence[int] = (),
        admission: Admission = "always",
        codec: type[BlockStates] = KVStates,
    ) -> None:
        if admission not in get_args(Admission):
            raise InvalidInputError(f"admission {admission!r} is unknown; use one of {get_args(Admission)}")
        self.model, self.store = model, store
        self.fingerprint = fingerprint
        self.blocks_see, self._stand_ins = blocks_see, tuple(stand_ins)
        self.admission = admission
        self.codec = codec
        self._on_probation: dict[str, float] = {}  # in memory alone: seconds to encode, by name
        self._stand_in_states: dict[str, KVStates] = {}  # by regime; encoded anew in each process

    def block(self, token_ids: Sequence[int], *, preamble: Sequence[int] = (), regime: str = "") -> Block:
        """Name the block of a passage in a prompt with this preamble."""
        seen = self.seen_by(token_ids, preamble=preamble, regime=regime)
        return self._named(token_ids, regime, seen)

    def preamble_block(self, preamble: Sequence[int], *, regime: str = "") -> Block:
        """Name the block of a preamble, which has nothing before it."""
        return self._named(preamble, regime)

    def _named(self, token_ids: Sequence[int], regime: str, seen: Sequence[int] = ()) -> Block:
        return _named(tuple(token_ids), f"{self.fingerprint}/{regime}", tuple(seen))

    def seen_by(
        self, token_ids: Sequence[int], *, preamble: Sequence[int], regime: str = ""
    ) -> Sequence[int]:
        """Return the tokens that the block of a passage attends to before its own.

        One that would not fit behind stand-ins, or not with the same rotary frequencies, sees itself alone.
        """
        if self.blocks_see == "preamble":
            return preamble
        length = len(self._stand_ins) + len(token_ids)
        is_usual = regime != "" or self.model.regime(length) == ""
        if self.blocks_see == "stand-ins" and length <= self.model.max_length and is_usual:
            return self._stand_ins
        return ()

    def num_bytes(self, num_tokens: int) -> int:
        """Return the size of the states of a block of so many tokens."""
        shape = (self.model.num_layers, self.model.num_kv_heads, num_tokens, self.model.head_dim)
        return self.codec.num_bytes_of(shape, self.model.dtype)

    def load(self, plan: Plan) -> dict[str, BlockStates]:
        """Return the states of those blocks of a plan that are stored, and note them in the plan."""
        start = time.perf_counter()
        states = self.store.get_many(list({block.block_id for block in plan.blocks.values()}))
        plan.found = frozenset(states)
        plan.load_seconds = time.perf_counter() - start
        return states

    def encode_missing(self, plan: Plan) -> dict[str, BlockStates]:
        """Encode those blocks of a plan that were not found, admit them, and return their states."""
        start = time.perf_counter()
        missing = {b.block_id: b for b in plan.blocks.values() if b.block_id not in plan.found}
        preamble = plan.segments[0].token_ids
        encoded: dict[str, BlockStates] = {}
        admission: Admission = "off" if plan.is_replay else self.admission
        first = plan.blocks.get(0)
        if first is not None and missing.pop(first.block_id, None) is not None:
            encoded[first.block_id] = self._preamble(
                preamble, plan.regime, admission, is_shared=plan.shares_preamble
            )
        for batch, seconds in self.encode(list(missing.values()), preamble, plan.regime):
            encoded |= batch
            self._admit(batch, seconds, admission)
        if admission != "off":
            plan.num_stored = sum(states.num_tokens for states in encoded.values())
        plan.encode_seconds = time.perf_counter() - start
        return encoded

    def promote(self, plan: Plan, states: Mapping[str, BlockStates]) -> None:
        """Store what a plan found in memory alone: it has been used for the second time."""
        for name in plan.found & states.keys() & self._on_probation.keys():
            seconds = self._on_probation.pop(name, None)
            if seconds is not None:
                self._store({name: states[name]}, seconds)

    def encode(
        self, blocks: Sequence[Block], preamble: Sequence[int] = (), regime: str = ""
    ) -> Iterator[tuple[dict[str, BlockStates], float]]:
        """Yield the states of blocks a batch at a time, with the seconds that each batch took."""
        alike: dict[Sequence[int], list[Block]] = {}
        for block in blocks:
            seen = tuple(self.seen_by(block.token_ids, preamble=preamble, regime=regime))
            alike.setdefault(seen, []).append(block)
        for what, members in alike.items():
            before = self._before(what, regime)
            start = time.perf_counter()
            token_ids = [block.token_ids for block in members]
            for batch in encode_blocks(self.model, token_ids, conditioned_on=before, regime=regime):
                states = {members[index].block_id: self.codec.pack(states) for index, states in batch}
                yield states, time.perf_counter() - start
                start = time.perf_counter()

    def _before(self, seen: Sequence[int], regime: str) -> KVStates | None:
        """Return the states that blocks attend to before their own; None for none."""
        if not seen:
            return None
        if self.blocks_see == "preamble":
            return self._preamble(seen, regime, self.admission).unpack()
        if regime not in self._stand_in_states:
            [[(_, self._stand_in_states[regime])]] = encode_blocks(self.model, [seen], regime=regime)
        return self._stand_in_states[regime]

    def _preamble(
        self, preamble: Sequence[int], regime: str, admission: Admission, *, is_shared: bool = True
    ) -> BlockStates:
        """Return the states of a preamble; one that few prompts share is not stored at its first use."""
        name = self.preamble_block(preamble, regime=regime).block_id
        states = self.store.get(name)
        if states is None:
            start = time.perf_counter()
            [[(_, encoded)]] = encode_blocks(self.model, [preamble], regime=regime)
            states = self.codec.pack(encoded)
            if admission == "always" and not is_shared:
                admission = "frequency"
            self._admit({name: states}, time.perf_counter() - start, admission)
        return states

    def _admit(self, states: Mapping[str, BlockStates], seconds: float, admission: Admission) -> None:
        """Keep blocks that an answer needed, where the admission says."""
        if admission == "always" or (admission == "frequency" and self.store.disk is None):
            self._store(states, seconds)
        elif admission == "frequency":
            kept = self.store.keep_in_memory(states, cost_seconds=seconds)
            self._on_probation.update(dict.fromkeys(kept, seconds / len(states)))
            while len(self._on_probation) > _MAX_ON_PROBATION:
                self._on_probation.pop(next(iter(self._on_probation)), None)

    def _store(self, states: Mapping[str, BlockStates], seconds: float) -> None:
        """Store blocks; a full disk must not cost the answer."""
        try:
            self.store.put_many(states, cost_seconds=seconds)
        except OutOfSpaceError as error:
            logger.warning("answering goes on, but %d blocks were not stored: %s", len(states), error)


@lru_cache(maxsize=4096)  # a passage that is popular stands in one prompt after another
def _named(token_ids: tuple[int, ...], fingerprint: str, seen: tuple[int, ...]) -> Block:
    return Block(token_ids, block_id(token_ids, fingerprint=fingerprint, conditioned_on=seen))

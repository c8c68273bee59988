"""KV states in memory, by block id."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.store.batches import NewBlock, new_blocks
from rag_blockcache.store.block_store import BlockStore
from rag_blockcache.store.eviction import priority
from rag_blockcache.store.stats import StoreStats


@dataclass
class _Entry:
    states: BlockStates
    num_bytes: int
    cost_seconds: float
    num_uses: int
    priority: float


class MemoryStore(BlockStore):
    """KV states in memory, by block id: a mapping with a budget that threads may share.

    Tensors are held as they come: those of a memory-mapped block stay mapped, and count at their size.
    Only a tensor that is a small window on a larger one is copied, since it would keep all of it alive.
    What is worth least is evicted first (see ``eviction.priority``), so a block that was there a moment
    ago may be a miss.

    Args:
        size_limit_bytes: Budget for keys and values; None for no limit. A block larger than what the
            pinned ones leave free is not kept.

    Raises:
        InvalidInputError: If the budget is negative.

    Example:
        >>> import torch
        >>> from rag_blockcache.kv_states import KVStates
        >>> from rag_blockcache.store import MemoryStore
        >>> store = MemoryStore(size_limit_bytes=2**20)
        >>> store["a"] = KVStates(torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        >>> store["a"].num_tokens, "b" in store
        (3, False)
    """

    def __init__(self, size_limit_bytes: int | None = None) -> None:
        if size_limit_bytes is not None and size_limit_bytes < 0:
            raise InvalidInputError(
                f"size_limit_bytes is {size_limit_bytes}; pass 0 to keep nothing, or None for no limit"
            )
        self.size_limit_bytes = size_limit_bytes
        self._entries: dict[str, _Entry] = {}
        self._pinned: set[str] = set()
        self._size_bytes = 0
        self._clock = 0.0
        self._num_hits = self._num_misses = self._num_evictions = 0
        self._lock = threading.RLock()

    def __getitem__(self, block_id: str) -> BlockStates:
        with self._lock:
            states = self._use(block_id)
        if states is None:
            raise KeyError(block_id)
        return states

    def __delitem__(self, block_id: str) -> None:
        with self._lock:
            self._size_bytes -= self._entries.pop(block_id).num_bytes

    def __contains__(self, block_id: object) -> bool:
        return block_id in self._entries  # the inherited test would count as a use

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def put_many(
        self, blocks: Mapping[str, BlockStates] | Iterable[tuple[str, BlockStates]], cost_seconds: float = 0.0
    ) -> list[str]:
        """Keep several blocks; see ``BlockStore.put_many``."""
        return [block.block_id for block in new_blocks(blocks, cost_seconds) if self._keep(block)]

    def get_many(self, block_ids: Iterable[str]) -> dict[str, BlockStates]:
        """Return those of the blocks that are held, in the order asked for."""
        found = {}
        with self._lock:
            for block_id in dict.fromkeys(block_ids):
                states = self._use(block_id)
                if states is not None:
                    found[block_id] = states
        return found

    def count_uses(self, block_ids: Iterable[str]) -> None:
        """Count a use of blocks that were served from elsewhere, so that they are not evicted as idle."""
        with self._lock:
            for block_id in block_ids:
                if block_id in self._entries:
                    self._count_use(self._entries[block_id])

    def pin(self, block_ids: Iterable[str]) -> None:
        """Keep these blocks from eviction, now or when they arrive, until they are unpinned."""
        with self._lock:
            self._pinned.update(block_ids)

    def unpin(self, block_ids: Iterable[str]) -> None:
        """Let eviction take these blocks again; ids that are not pinned are passed over."""
        with self._lock:
            self._pinned.difference_update(block_ids)

    @property
    def size_bytes(self) -> int:
        """Size of all keys and values held, in bytes."""
        return self._size_bytes

    def stats(self) -> StoreStats:
        """Return what is held, and the hits, misses and evictions so far."""
        with self._lock:
            return StoreStats(
                num_blocks=len(self._entries),
                num_bytes=self._size_bytes,
                size_limit_bytes=self.size_limit_bytes,
                num_pinned=len(self._pinned),
                num_hits=self._num_hits,
                num_misses=self._num_misses,
                num_evictions=self._num_evictions,
            )

    def verify(self, block_id: str) -> None:
        """Raise ``KeyError`` if the block is not held; memory itself is not checked."""
        if block_id not in self:
            raise KeyError(block_id)

    def flush(self) -> None:
        """Do nothing: use counts live and end with the store."""

    def close(self) -> None:
        """Let go of all blocks. Tensors handed out stay valid."""
        with self._lock:
            self._entries.clear()
            self._size_bytes = 0

    def _keep(self, block: NewBlock) -> bool:
        with self._lock:
            if block.block_id in self._entries:
                return True
            if block.states.num_bytes > self._room():
                return False
            self._make_room(block.states.num_bytes)
            self._enter(block, block.states.mapped(own_storage))
            return True

    def _enter(self, block: NewBlock, states: BlockStates) -> None:
        entry = _Entry(states, states.num_bytes, block.cost_seconds, num_uses=0, priority=0.0)
        self._count_use(entry)
        self._entries[block.block_id] = entry
        self._size_bytes += entry.num_bytes

    def _use(self, block_id: str) -> BlockStates | None:
        """Return a block that somebody asks for, and count that; the lock is held."""
        entry = self._entries.get(block_id)
        if entry is None:
            self._num_misses += 1
            return None
        self._num_hits += 1
        self._count_use(entry)
        return entry.states

    def _count_use(self, entry: _Entry) -> None:
        entry.num_uses += 1
        entry.priority = priority(self._clock, entry.num_uses, entry.cost_seconds, entry.num_bytes)

    def _room(self, beside: Collection[str] = ()) -> float:
        """Return how many bytes new blocks may take, if all go that are neither pinned nor ``beside``."""
        if self.size_limit_bytes is None:
            return math.inf
        kept = (self._pinned | set(beside)) & self._entries.keys()
        return self.size_limit_bytes - sum(self._entries[block_id].num_bytes for block_id in kept)

    def _make_room(self, num_bytes: int, beside: Collection[str] = ()) -> None:
        """Evict what is worth least until ``num_bytes`` more fit, which ``_room`` says they can."""
        limit = self.size_limit_bytes
        if limit is None or self._size_bytes + num_bytes <= limit:
            return
        kept = self._pinned | set(beside)
        candidates = [block_id for block_id in self._entries if block_id not in kept]  # the oldest first
        for block_id in sorted(candidates, key=lambda name: self._entries[name].priority):
            if self._size_bytes + num_bytes <= limit:
                break
            self._clock = max(self._clock, self._entries[block_id].priority)
            del self[block_id]
            self._num_evictions += 1


def own_storage(tensor: Tensor) -> Tensor:
    """Copy a tensor that views a much larger one, which would otherwise stay alive uncounted."""
    tensor = tensor.detach()
    is_window = tensor.untyped_storage().nbytes() > 2 * tensor.nbytes + 4096
    return tensor.clone() if is_window else tensor

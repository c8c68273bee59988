"""Memory before disk, as one mapping."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from rag_blockcache.errors import CorruptBlockError, InvalidInputError
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.store.batches import Room
from rag_blockcache.store.block_store import BlockStore
from rag_blockcache.store.disk import DiskStore
from rag_blockcache.store.memory import MemoryStore
from rag_blockcache.store.stats import TieredStats


class TieredStore(BlockStore):
    """KV states by block id, in memory where they were used lately, and on disk.

    A look-up asks memory, then disk, and keeps what the disk had in memory, as a memory map. Writing goes
    to both. A damaged block is logged and dropped by the disk, and a plain miss here, so that whoever
    asked encodes it again.

    Args:
        memory: The upper tier, or None.
        disk: The lower tier, or None.

    Raises:
        InvalidInputError: If there is no tier at all.

    Example:
        >>> from rag_blockcache.store import MemoryStore, TieredStore
        >>> store = TieredStore(MemoryStore(), None)
        >>> store.get("a") is None
        True
    """

    def __init__(self, memory: MemoryStore | None, disk: DiskStore | None) -> None:
        if memory is None and disk is None:
            raise InvalidInputError(
                "a tiered store needs a memory or a disk store; pass one of them at least"
            )
        self.memory = memory
        self.disk = disk

    def __getitem__(self, block_id: str) -> BlockStates:
        if self.memory is not None:
            states = self.memory.get(block_id)
            if states is not None:
                if self.disk is not None:
                    self.disk.count_uses([block_id])  # what memory serves must not look idle on disk
                return states
        if self.disk is None:
            raise KeyError(block_id)
        try:
            states = self.disk[block_id]
        except CorruptBlockError as error:
            raise KeyError(block_id) from error
        if self.memory is not None:
            self.memory.put(block_id, states)
        return states

    def __delitem__(self, block_id: str) -> None:
        num_found = 0
        for tier in self._tiers:
            with suppress(KeyError):
                del tier[block_id]
                num_found += 1
        if not num_found:
            raise KeyError(block_id)

    def __contains__(self, block_id: object) -> bool:
        return any(block_id in tier for tier in self._tiers)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(block_id for tier in reversed(self._tiers) for block_id in tier))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def keeps(self, block_id: str) -> bool:
        """Tell whether the lowest tier holds a block, so that it stays when memory lets go of it."""
        return block_id in self._tiers[-1]

    def room(self, *, evicting: bool) -> Room:
        """Return what the disk budget leaves for new blocks; see ``DiskStore.room``."""
        return Room(None) if self.disk is None else self.disk.room(evicting=evicting)

    def clear(self) -> None:
        """Delete all blocks from all tiers. Tensors handed out stay valid."""
        for tier in self._tiers:
            tier.clear()

    def put_many(
        self, blocks: Mapping[str, BlockStates] | Iterable[tuple[str, BlockStates]], cost_seconds: float = 0.0
    ) -> list[str]:
        """Store several blocks on disk, and keep them in memory; see ``BlockStore.put_many``.

        Returns:
            Ids of the blocks that the lowest tier holds now, in order.
        """
        pairs = list(blocks.items() if isinstance(blocks, Mapping) else blocks)
        kept = self._tiers[-1].put_many(pairs, cost_seconds)
        if self.memory is not None and self.disk is not None:
            self.memory.put_many(pairs)  # without cost: a miss there costs a load from disk, alike for all
        return kept

    def get_many(self, block_ids: Iterable[str]) -> dict[str, BlockStates]:
        """Return those of the blocks that any tier holds, in the order asked for."""
        wanted = list(dict.fromkeys(block_ids))
        found = self.memory.get_many(wanted) if self.memory is not None else {}
        if self.disk is None:
            return found
        self.disk.count_uses(found)
        loaded = self.disk.get_many(block_id for block_id in wanted if block_id not in found)
        if self.memory is not None:
            self.memory.put_many(loaded)
        found |= loaded
        return {block_id: found[block_id] for block_id in wanted if block_id in found}

    def prefetch(self, block_ids: Iterable[str]) -> list[str]:
        """Bring blocks from disk into memory before anybody asks for them; no use is counted.

        Returns:
            Ids of those that came from the disk, in order.
        """
        if self.disk is None:
            return []
        memory = self.memory
        loaded = self.disk.preload(name for name in block_ids if memory is None or name not in memory)
        if memory is not None:
            memory.put_many(loaded)
        return list(loaded)

    def pin(self, block_ids: Iterable[str]) -> None:
        """Keep these blocks from eviction in every tier, now or when they arrive."""
        pinned = list(block_ids)
        for tier in self._tiers:
            tier.pin(pinned)

    def unpin(self, block_ids: Iterable[str]) -> None:
        """Let eviction take these blocks again."""
        unpinned = list(block_ids)
        for tier in self._tiers:
            tier.unpin(unpinned)

    @property
    def size_bytes(self) -> int:
        """Size of what the lowest tier holds, in bytes."""
        return self._tiers[-1].size_bytes

    def stats(self) -> TieredStats:
        """Return the counters of each tier."""
        return TieredStats(
            memory=self.memory.stats() if self.memory is not None else None,
            disk=self.disk.stats() if self.disk is not None else None,
        )

    def verify(self, block_id: str) -> None:
        """Compare the checksum of a block in the lowest tier; see ``DiskStore.verify``."""
        self._tiers[-1].verify(block_id)

    def flush(self) -> None:
        """Bring the uses counted in this process to disk."""
        for tier in self._tiers:
            tier.flush()

    def close(self) -> None:
        """Flush and close all tiers. Tensors handed out stay valid."""
        for tier in self._tiers:
            tier.close()

    @property
    def _tiers(self) -> list[MemoryStore | DiskStore]:
        return [tier for tier in (self.memory, self.disk) if tier is not None]

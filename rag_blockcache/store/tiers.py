"""Device before memory before disk, as one mapping."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial

from torch import Tensor

from rag_blockcache.errors import InvalidInputError
from rag_blockcache.kv_states import BlockStates
from rag_blockcache.store.batches import Room
from rag_blockcache.store.block_store import BlockStore
from rag_blockcache.store.device import DeviceStore
from rag_blockcache.store.disk import DiskStore
from rag_blockcache.store.memory import MemoryStore
from rag_blockcache.store.stats import TieredStats
from rag_blockcache.workers import Workers


class TieredStore(BlockStore):
    """KV states by block id: on the model's device, in memory, and on disk.

    A look-up asks device, memory, then disk, and what it finds moves up a tier: what the disk had is kept in
    memory, as a memory map, and what memory had is copied to the device, where there is room. Writing goes
    to memory and disk. A damaged block is logged and dropped by the disk, and a plain miss here, so that
    whoever asked encodes it again.

    Args:
        memory: The tier before the disk, or None.
        disk: The lowest tier, or None.
        device: The tier before memory, or None. With it, memory is the host's: blocks that come from
            the device are copied. Without, they are held wherever they are.

    Raises:
        InvalidInputError: If there is neither memory nor disk.

    Example:
        >>> from rag_blockcache.store import MemoryStore, TieredStore
        >>> store = TieredStore(MemoryStore(), None)
        >>> store.get("a") is None
        True
    """

    def __init__(
        self, memory: MemoryStore | None, disk: DiskStore | None, device: DeviceStore | None = None
    ) -> None:
        if memory is None and disk is None:
            raise InvalidInputError(
                "a tiered store needs a memory or a disk store; pass one of them at least"
            )
        self.device = device
        self.memory = memory
        self.disk = disk

    def __getitem__(self, block_id: str) -> BlockStates:
        return self.get_many([block_id])[block_id]

    def __delitem__(self, block_id: str) -> None:
        num_found = 0
        for tier in reversed(self._tiers):  # upwards, see ``_move_up``
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
        """Tell whether the lowest tier holds a block, so that it stays when those above let go of it."""
        return block_id in self._lowest

    def room(self, *, evicting: bool) -> Room:
        """Return what the disk budget leaves for new blocks; see ``DiskStore.room``."""
        return Room(None) if self.disk is None else self.disk.room(evicting=evicting)

    def clear(self) -> None:
        """Delete all blocks from all tiers. Tensors handed out stay valid."""
        for tier in reversed(self._tiers):
            tier.clear()

    def put_many(
        self, blocks: Mapping[str, BlockStates] | Iterable[tuple[str, BlockStates]], cost_seconds: float = 0.0
    ) -> list[str]:
        """Store several blocks on disk, and keep them in memory; see ``BlockStore.put_many``.

        Those that are on the device stay there as well, if that has room for them.

        Returns:
            Ids of the blocks that the lowest tier holds now, in order.
        """
        pairs = list(blocks.items() if isinstance(blocks, Mapping) else blocks)
        on_host = self._on_host(pairs)
        kept = self._lowest.put_many(on_host, cost_seconds)
        if self.memory is not None and self.disk is not None:
            self.memory.put_many(on_host)  # without cost: a miss there costs a load from disk, alike for all
        self._fill_device(pairs, kept)
        return kept

    def keep_in_memory(self, blocks: Mapping[str, BlockStates], cost_seconds: float = 0.0) -> list[str]:
        """Keep several blocks as ``put_many`` does, but not on disk.

        Returns:
            Ids of the blocks that memory holds now, in order.
        """
        if self.memory is None:
            return []
        kept = self.memory.put_many(self._on_host(blocks.items()), cost_seconds)
        self._fill_device(blocks.items(), kept)
        return kept

    def get_many(self, block_ids: Iterable[str]) -> dict[str, BlockStates]:
        """Return those of the blocks that any tier holds, in the order asked for."""
        wanted = list(dict.fromkeys(block_ids))
        found = self.device.get_many(wanted) if self.device is not None else {}
        if self.memory is not None:
            if self.disk is None:
                self.memory.count_uses(found)  # what is served above the lowest tier must not look idle there
            held = self.memory.get_many(block_id for block_id in wanted if block_id not in found)
            found |= held | self._move_up(held, beside=found)
        if self.disk is not None:
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
        above = [tier for tier in self._tiers if tier is not self.disk]
        loaded = self.disk.preload(name for name in block_ids if not any(name in tier for tier in above))
        if self.memory is not None:
            self.memory.put_many(loaded)
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
        return self._lowest.size_bytes

    def stats(self) -> TieredStats:
        """Return the counters of each tier."""
        return TieredStats(
            device=self.device.stats() if self.device is not None else None,
            memory=self.memory.stats() if self.memory is not None else None,
            disk=self.disk.stats() if self.disk is not None else None,
        )

    def verify(self, block_id: str) -> None:
        """Compare the checksum of a block in the lowest tier; see ``DiskStore.verify``."""
        self._lowest.verify(block_id)

    def flush(self) -> None:
        """Bring the uses counted in this process to disk."""
        for tier in self._tiers:
            tier.flush()

    def close(self) -> None:
        """Flush and close all tiers. Tensors handed out stay valid."""
        for tier in self._tiers:
            tier.close()

    def _move_up(self, held: Mapping[str, BlockStates], *, beside: Collection[str]) -> dict[str, BlockStates]:
        """Copy blocks that memory holds to the device, and return what came there.

        A block that is deleted meanwhile is gone from memory before it is looked for on the device, so here
        it is looked for the other way round.
        """
        if self.device is None or self.memory is None:
            return {}
        copies = self.device.admit(held, beside=beside)
        for block_id in [name for name in copies if name not in self.memory]:
            self.device.pop(block_id, None)
        return copies

    def _fill_device(self, blocks: Iterable[tuple[str, BlockStates]], kept: Iterable[str]) -> None:
        """Keep what was just encoded where it is, as far as it is kept at all and there is room."""
        if self.device is not None:
            names = set(kept)
            self.device.fill({block_id: states for block_id, states in blocks if block_id in names})

    def _on_host(self, blocks: Iterable[tuple[str, BlockStates]]) -> list[tuple[str, BlockStates]]:
        """Copy blocks from the device, once for all tiers below it."""
        if self.device is None:
            return list(blocks)
        pairs = list(blocks)
        with Workers() as workers:
            copies = workers.begin([partial(states.mapped, Tensor.cpu) for _, states in pairs])
            return [(block_id, copied()) for (block_id, _), copied in zip(pairs, copies, strict=True)]

    @property
    def _lowest(self) -> MemoryStore | DiskStore:
        return self._tiers[-1]

    @property
    def _tiers(self) -> list[MemoryStore | DiskStore]:
        return [tier for tier in (self.device, self.memory, self.disk) if tier is not None]

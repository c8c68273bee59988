"""KV states on the device of a model, by block id."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from rag_blockcache.kv_states import BlockStates
from rag_blockcache.store.batches import new_blocks
from rag_blockcache.store.memory import MemoryStore, own_storage

logger = logging.getLogger(__name__)

Copy = Callable[[Sequence[BlockStates]], Sequence[BlockStates]]


class DeviceStore(MemoryStore):
    """Copies of blocks on the device of a model, where placing them takes no time on the bus.

    A miss costs a copy from the host, alike for all bytes, so what is used least goes first. Nothing is
    lost with it: a lower tier holds the block too.

    Args:
        device: The device.
        copy: Copies blocks to the device, each into memory of its own; where that has no room for all,
            only the first ones.
        size_limit_bytes: Budget for keys and values.

    Raises:
        InvalidInputError: If the budget is negative.

    Example:
        >>> import torch
        >>> from rag_blockcache.kv_states import KVStates
        >>> from rag_blockcache.store import DeviceStore
        >>> def copy(blocks):
        ...     return [states.mapped(torch.clone) for states in blocks]
        >>> store = DeviceStore(torch.device("cpu"), copy, size_limit_bytes=2**20)
        >>> list(store.admit({"a": KVStates(torch.zeros(2, 1, 3, 4), torch.ones(2, 1, 3, 4))}))
        ['a']
    """

    def __init__(self, device: torch.device, copy: Copy, size_limit_bytes: int) -> None:
        super().__init__(size_limit_bytes)
        self._device = device
        self._copy = copy
        self._admitting = threading.Lock()  # what one thread makes room for, another must not fill

    def admit(
        self, blocks: Mapping[str, BlockStates], *, beside: Collection[str] = ()
    ) -> dict[str, BlockStates]:
        """Copy blocks to the device, as many as others can make room for.

        Args:
            blocks: Blocks that are elsewhere, the most wanted first.
            beside: Blocks that must not go for them, since the same request uses them.

        Returns:
            The copies, by block id.
        """
        with self._admitting:
            chosen = self._choose(blocks, beside)
            copied = self._copy(list(chosen.values())) if chosen else []
            copies = dict(zip(chosen, copied, strict=False))
            self._hold(copies)
            if len(copies) < len(chosen):
                self._settle_for_less()
        return copies

    def fill(self, blocks: Mapping[str, BlockStates]) -> None:
        """Keep those blocks that are on the device already, as far as there is room; none goes for them."""
        here = {block_id: states for block_id, states in blocks.items() if states.device == self._device}
        with self._admitting:
            chosen = self._choose(here, beside=set(self))
            self._hold({block_id: states.mapped(own_storage) for block_id, states in chosen.items()})

    def _choose(self, blocks: Mapping[str, BlockStates], beside: Collection[str]) -> dict[str, BlockStates]:
        """Return those of the blocks that fit together, and evict what is in their way."""
        chosen, num_bytes = {}, 0
        with self._lock:
            room = self._room(beside)
            for block_id, states in blocks.items():
                if block_id not in self._entries and num_bytes + states.num_bytes <= room:
                    chosen[block_id] = states
                    num_bytes += states.num_bytes
            self._make_room(num_bytes, beside)
        return chosen

    def _hold(self, states: Mapping[str, BlockStates]) -> None:
        with self._lock:
            for block in new_blocks(states, cost_seconds=0.0):
                self._enter(block, block.states)

    def _settle_for_less(self) -> None:
        """Take what is held now as the budget: the device has no memory for more."""
        self.size_limit_bytes = self._size_bytes
        logger.warning(
            "the device has no memory left for more blocks; from now on they may take %d bytes there; "
            "a smaller device_budget_bytes leaves room from the start",
            self.size_limit_bytes,
        )

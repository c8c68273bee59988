"""How soon a first token can be at all: bytes that must be moved, by what a GPU was seen to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from rag_blockcache.evaluation.stopwatch import Clock
from rag_blockcache.model import Model

_COPY_BYTES = 2**30
_ROUNDS = 5


@dataclass(frozen=True)
class Bandwidth:
    """Bytes that a GPU moves in a second.

    Attributes:
        memory: Read and written by a copy within its memory.
        bus: Copied from pinned memory of the host.
    """

    memory: float
    bus: float

    @classmethod
    def of(cls, device: torch.device) -> Bandwidth:
        """Measure a GPU; the best of some rounds counts, since this is to be a bound."""
        there = torch.empty((2, _COPY_BYTES), dtype=torch.uint8, device=device)
        here = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
        within = _seconds(device, lambda: there[0].copy_(there[1]))
        across = _seconds(device, lambda: there[0].copy_(here, non_blocking=True))
        return cls(memory=2 * _COPY_BYTES / within, bus=_COPY_BYTES / across)

    def memory_floor_seconds(self, model: Model, kv_bytes: int) -> float:
        """Return the least time for blocks in the GPU's memory: weights once, keys and values three times.

        They are read and written by placing, and read by attention.
        """
        network = model.network
        embedding = cast(torch.Tensor, network.get_input_embeddings().weight)
        weights = sum(each.nbytes for each in network.parameters())
        if embedding is not network.get_output_embeddings().weight:  # type: ignore[no-untyped-call]
            weights -= embedding.nbytes  # a few of its rows are read
        return (weights + 3 * kv_bytes) / self.memory

    def bus_floor_seconds(self, kv_bytes: int) -> float:
        """Return the least time for exact blocks in the host's memory: keys and values once over the bus."""
        return kv_bytes / self.bus


def _seconds(device: torch.device, copy: Callable[[], object]) -> float:
    clock = Clock(device)
    found = []
    for _ in range(_ROUNDS):
        start = clock()
        copy()
        found.append(clock() - start)
    return min(found)
